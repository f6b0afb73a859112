"""The trust region on two real ranks over gloo: all of them take one decision, and none waits for another in vain."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import WORLD, Ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from extraopt import ExtraAdam, JumpReport

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

EVERY = 3
OPEN: dict[str, Any] = {"lr": 3e-4, "extra_every": EVERY, "extra_gate": None}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(str(tmp_path_factory.mktemp("ranks") / "store"))
    yield ranks
    ranks.close()


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, num_key_value_heads=1, pad_token_id=0, **sizes))


def batch(step: int, rows: int = 2, width: int = 8) -> dict[str, Tensor]:
    ids = (torch.arange(width).repeat(rows, 1) * (step % 5 + 1) + step + torch.arange(rows)[:, None]) % 13 + 3
    return {"input_ids": ids, "labels": ids.clone()}


class Seen:
    """What a rank saw of its run; equal on all ranks, but for its own passes and warnings."""

    def __init__(self, model: nn.Module) -> None:
        self.passes: list[int] = []
        self.count = 0
        self.reports: list[str] = []
        self.losses: list[float] = []
        self.lengths: list[float] = []
        self.kls: list[float] = []
        self.warnings: list[str] = []
        model.register_forward_pre_hook(self.hook)

    def hook(self, *_: Any) -> None:
        self.count += not torch.is_grad_enabled()

    def add(self, report: JumpReport) -> None:
        self.reports.append(repr(report))
        self.lengths.append(report.length)
        self.kls.append(report.kl)


def run(
    model: Any, optimizer: ExtraAdam, inner: nn.Module, inputs: Callable[[int], dict[str, Tensor]],
    steps: int = 3 * EVERY, between: Callable[[int], None] = lambda step: None,
) -> Seen:  # fmt: skip
    seen = Seen(inner)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(steps):
            optimizer.zero_grad()
            output = model(**inputs(step))
            loss = output.loss if bool((inputs(step)["labels"][:, 1:] != -100).any()) else output.logits.sum() * 0
            loss.backward()
            between(step)
            last, seen.count = optimizer.last_jump, 0
            rng = torch.get_rng_state()
            optimizer.step()
            assert torch.equal(torch.get_rng_state(), rng) and all(module.training for module in model.modules())
            if optimizer.last_jump is not last:
                seen.add(optimizer.last_jump)
                seen.passes.append(seen.count)
            seen.losses.append(float(loss.detach()))
    seen.warnings = [str(w.message) for w in caught if "extraopt" in str(w.message)]
    return seen


def weights(model: nn.Module) -> list[Any]:
    return [getattr(p.detach(), "full_tensor", p.detach)().double().numpy().tobytes() for p in model.parameters()]


def of_rank(rank: int, kind: str) -> Callable[[int], dict[str, Tensor]]:
    def inputs(step: int) -> dict[str, Tensor]:
        if kind == "unequal":
            return batch(step + 40 * rank, rows=2 + rank, width=8 - 3 * rank)
        made = batch(step + 40 * rank)
        if kind == "no label" and rank:
            made["labels"][:] = -100
        return made

    return inputs


class Fails(nn.Module):
    """On one rank, at its nth pass without gradients, or by giving no logits there."""

    def __init__(self, at: int, silently: bool = False) -> None:
        super().__init__()
        self.inner, self.silently = llama(), silently
        self.passes: Any = lambda: None  # what lies in an attribute, or in an object of a class, would be put back
        self.passes.left = at

    def forward(self, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            self.passes.left -= 1
            if self.passes.left == 0 and self.silently:
                return None
            if self.passes.left == 0:
                raise torch.OutOfMemoryError("no")
        return self.inner(**named)


def rank_ddp(rank: int, kind: str) -> tuple[Any, ...]:
    at = {"fails": 1, "fails at a trial": 2, "no logits": 1}.get(kind)
    model = llama() if at is None else Fails(at if rank else 0, kind == "no logits")
    ddp = DistributedDataParallel(model)
    optimizer = ExtraAdam(ddp.parameters(), **OPEN)
    seen = run(ddp, optimizer, model, of_rank(rank, kind))
    assert ddp.require_forward_param_sync
    return seen.reports, weights(model), seen.lengths, seen.kls, seen.passes, seen.warnings


@pytest.mark.parametrize("kind", ["equal", "unequal", "no label"])
def test_ddp_ranks_jump_together(ranks: Ranks, kind: str) -> None:
    """Each has inputs of its own, of another size, or nothing to look at."""
    first, second = ranks.run(rank_ddp, kind)
    assert first[:5] == second[:5] and not first[5] + second[5]
    assert all(length > 0 for length in first[2]) and all(0 < kl <= 0.02 for kl in first[3])
    assert all(2 <= passes <= 4 for passes in first[4])


@pytest.mark.parametrize("kind", ["fails", "fails at a trial"])
def test_a_trial_that_fails_on_one_ddp_rank_fails_on_all(ranks: Ranks, kind: str) -> None:
    """None jumps, and the next cycle goes on."""
    first, second = ranks.run(rank_ddp, kind)
    assert first[:4] == second[:4] or str(first[:4]) == str(second[:4])
    assert first[2][0] == 0 and all(length > 0 for length in first[2][1:]) and all(kl > 0 for kl in first[3][1:])
    for _, _, _, _, _, caught in first, second:
        assert len(caught) == 1 and "a jump was left out, since" in caught[0]


def rank_join(rank: int) -> tuple[list[bytes], list[float], list[str]]:
    model = llama()
    ddp = DistributedDataParallel(model)
    optimizer = ExtraAdam(ddp.parameters(), **OPEN)
    with ddp.join():
        seen = run(ddp, optimizer, model, of_rank(rank, "alike"), 4 * EVERY if rank else 2 * EVERY)
    return weights(model), seen.lengths, seen.warnings


def test_uneven_inputs_within_ddps_join_abort_the_process(ranks: Ranks) -> None:
    """A rank that has ended answered our sums as if they were DDP's."""
    first, second = ranks.run(rank_join)
    assert first[0] == second[0]  # join ends with the weights of the rank that went on
    assert len(first[1]) == 2 and len(second[1]) == 4
    assert all(length <= 20 for length in second[1])
    assert all(len(said) == 1 and "within join()" in said[0] for said in (first[2], second[2]))


def test_ddp_ranks_jump_together_where_one_gives_no_logits(ranks: Ranks) -> None:
    """All are short from then on, and the warning of the one says why."""
    first, second = ranks.run(rank_ddp, "no logits")
    assert str(first[:4]) == str(second[:4]) and first[2] == [20, 20, 20]
    assert len(first[5]) == len(second[5]) == 1 and "another rank" in first[5][0]
    assert "give watch(model, logits=...)" in second[5][0]


class Parts(nn.Module):
    """Logits of a matrix that goes straight and one that noise moves."""

    def __init__(self) -> None:
        super().__init__()
        self.straight, self.noisy = (nn.Parameter(torch.zeros(16, 16 - i)) for i in range(2))

    def forward(self, input_ids: Tensor, noise: Tensor) -> Any:
        return SimpleNamespace(logits=self.straight[input_ids] + (self.noisy * noise).sum() * 0.01)


def rank_of_parts(rank: int, kind: str, steps: int = 40) -> tuple[Any, ...]:
    """Each rank steps one of the two: as a shard of ZeRO's, or by a plan of the user's own."""
    model = Parts()
    ddp = DistributedDataParallel(model)
    torch.manual_seed(1)
    lengths = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        own: Any
        if kind == "ZeRO":
            optimizer: Any = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ExtraAdam, lr=1e-3)
            own = optimizer.optim
        else:
            optimizer = own = ExtraAdam([model.noisy if rank else model.straight], lr=1e-3)
            own.watch(ddp, process_group=torch.distributed.group.WORLD)
        for _ in range(steps):
            ids, noise = torch.randint(0, 16, (2, 7)), torch.randn(16, 15)
            for p in model.parameters():
                p.grad = None
            logits = ddp(ids, noise).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()) + (model.noisy * noise).sum()
            loss.backward()
            last = own.last_jump
            optimizer.step()
            if own.last_jump is not last:
                lengths.append(own.last_jump.length)
    return lengths, [str(w.message) for w in caught if "extraopt" in str(w.message)]


def test_a_rank_whose_gates_are_shut_leaves_the_others_waiting(ranks: Ranks) -> None:
    """It has tensors of its own: what it has to say is waited for, though nothing of it may jump."""
    (straight, caught), (noisy, others) = ranks.run(rank_of_parts, "own plan")
    assert not caught + others and len(straight) == len(noisy) == 8
    assert sum(length > 0 for length in straight) >= 5 > sum(length > 0 for length in noisy)


def test_shards_of_zero_redundancy_are_tried_one_by_one(ranks: Ranks) -> None:
    """No trial would see the others' part of a jump: no trust region, short jumps, and no rank waits for another."""
    for lengths, caught in ranks.run(rank_of_parts, "ZeRO"):
        assert len(lengths) == 8 and max(lengths) <= 20
        assert all("ZeroRedundancyOptimizer" in text and "process_group" in text for text in caught)
    assert any(caught for _, caught in ranks.run(rank_of_parts, "ZeRO"))


def rank_sum(rank: int) -> list[float]:
    """The mean over the positions of both ranks, not over their means."""
    model = llama()
    ddp = DistributedDataParallel(model)
    optimizer = ExtraAdam(ddp.parameters(), **OPEN)
    run(ddp, optimizer, model, of_rank(rank, "unequal"), EVERY - 1)
    optimizer.zero_grad()
    inputs = of_rank(rank, "unequal")(EVERY - 1)
    ddp(**inputs).loss.backward()
    twin = copy.deepcopy(model)
    adamw = torch.optim.AdamW(twin.parameters(), lr=OPEN["lr"])
    adamw.load_state_dict({**adamw.state_dict(), "state": copy.deepcopy(optimizer.state_dict()["state"])})
    for p, q in zip(model.parameters(), twin.parameters()):
        q.grad = p.grad.clone()
    adamw.step()
    optimizer.step()
    with torch.no_grad():
        b, a = (m.eval()(inputs["input_ids"]).logits[:, :-1].double().log_softmax(-1) for m in (twin, model))
    counts = (b.exp() >= 0.01).sum(-1) >= 2
    kl = (b.exp() * (b - a)).sum(-1)[counts].sum()
    cycle = 1 + EVERY / optimizer.last_jump.length  # real steps and jump, in jumps
    return [float(kl) * cycle**2, float(counts.sum()), optimizer.last_jump.kl]


def test_a_rank_with_fewer_positions_counts_as_much_as_one_with_many(ranks: Ranks) -> None:
    (kl, count, measured), (other_kl, other_count, same) = ranks.run(rank_sum)
    assert count != other_count and measured == same
    assert measured == pytest.approx((kl + other_kl) / (count + other_count), rel=1e-3)


def rank_fsdp(rank: int, mixed: bool, looked: bool, hybrid: bool = False) -> tuple[Any, ...]:
    """All ranks have the same inputs, so that a single process takes the same steps to rounding."""
    model = llama()
    options: dict[str, Any] = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if mixed else {}
    if hybrid:
        options["mesh"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    for layer in model.model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    optimizer = ExtraAdam(model.parameters(), **OPEN)

    def look(step: int) -> None:
        """After which the root stays gathered, and holds other parameters than the optimizer's.

        Between a backward pass and a step that ends no cycle that would be torch's next training pass of old weights.
        """
        if looked and step % EVERY == EVERY - 1:
            with torch.no_grad():
                model(**batch(99))

    look(-1)
    sharded = run(model, optimizer, model, batch, 5 * EVERY, look)
    single = llama()
    own = ExtraAdam(single.parameters(), **OPEN)
    own.watch(single, process_group=torch.distributed.group.WORLD)
    alone = run(single, own, single, batch, 5 * EVERY)
    far = max(
        float((getattr(p.detach(), "full_tensor", p.detach)() - q).abs().max())
        for p, q in zip(model.parameters(), single.parameters())
    )
    assert not alone.warnings
    return sharded.reports, weights(model), sharded.__dict__, alone.__dict__, far


@pytest.mark.parametrize("looked", [False, True], ids=["trains", "evaluates, too"])
def test_fsdp_ranks_compute_with_none_of_a_trials_weights_afterwards(ranks: Ranks, looked: bool) -> None:
    """FSDP2's root keeps what it has gathered: a later trial, and the next training pass, would be of old weights."""
    assert_as_one_process(ranks.run(rank_fsdp, False, looked))


def assert_as_one_process(results: list[Any]) -> None:
    """What `rank_fsdp` returned on each rank."""
    first, *others = results
    assert all(other[:2] == first[:2] for other in others)
    sharded, alone, far = first[2:]
    assert sharded["lengths"] == pytest.approx(alone["lengths"], rel=1e-4) and all(sharded["lengths"])
    assert sharded["kls"] == pytest.approx(alone["kls"], rel=1e-2) and all(0 < kl <= 0.02 for kl in sharded["kls"])
    assert sharded["losses"] == pytest.approx(alone["losses"], rel=1e-5) and far < 1e-5
    assert sharded["passes"] == alone["passes"] and not sharded["warnings"]


def test_fsdp_ranks_in_mixed_precision_jump_together(ranks: Ranks) -> None:
    first, second = ranks.run(rank_fsdp, True, False)
    assert first[:2] == second[:2] and not first[2]["warnings"]
    assert all(length > 0 for length in first[2]["lengths"]) and all(0 < kl <= 0.02 for kl in first[2]["kls"])


def test_hybrid_shards_are_those_of_one_model(tmp_path: Path) -> None:
    """HSDP, a mesh of two copies in two shards each: sums are over both dimensions, and each copy jumps alike."""
    ranks = Ranks(str(tmp_path / "store"), world=4)
    try:
        assert_as_one_process(ranks.run(rank_fsdp, False, True, True))
    finally:
        ranks.close()


def rank_fsdp_fails(rank: int) -> bool:
    """On both ranks: one alone would let the other wait. The run may go on, as if that step had not jumped."""
    model = Fails(2)
    fully_shard(model.inner.model.layers[0])
    fully_shard(model)
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    plain = Fails(0)
    for layer in (plain.inner.model.layers[0], plain):
        fully_shard(layer)
    adamw = torch.optim.AdamW(plain.parameters(), lr=OPEN["lr"])
    failed = False
    for step in range(EVERY + 2):
        for m, o in ((model, optimizer), (plain, adamw)):
            o.zero_grad()
            m(**batch(step)).loss.backward()
            try:
                o.step()
            except torch.OutOfMemoryError:
                failed = True
        if failed:
            optimizer.reset_anchor()
    same = [torch.equal(p.to_local(), q.to_local()) for p, q in zip(model.parameters(), plain.parameters())]
    return failed and all(same)


def test_a_trial_that_fails_under_fsdp_leaves_no_gathered_weights(ranks: Ranks) -> None:
    assert ranks.run(rank_fsdp_fails) == [True, True]


def rank_unknown(rank: int, told: bool) -> tuple[Any, ...]:
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    if told:
        optimizer.watch(model, process_group=torch.distributed.group.WORLD)
    seen = run(model, optimizer, model, batch)
    return seen.reports, weights(model), seen.lengths, seen.kls, seen.warnings


@pytest.mark.parametrize("told", [False, True])
def test_a_group_that_is_not_known_is_asked_for(ranks: Ranks, told: bool) -> None:
    first, second = ranks.run(rank_unknown, told)
    assert str(first) == str(second)
    if told:
        assert not first[4] and all(0 < kl <= 0.02 for kl in first[3])
    else:
        assert first[2] == [20, 20, 20] and all(map(math.isnan, first[3]))
        (text,) = first[4]
        assert "which of its ranks train this model is not known: give watch(model, process_group=...)" in text


def rank_fsdp1(rank: int) -> tuple[list[float], list[str]]:
    model = FullyShardedDataParallel(llama(), use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    seen = run(model, optimizer, model, batch)
    return seen.lengths, seen.warnings


def test_fsdp1_is_refused_in_words(ranks: Ranks) -> None:
    for lengths, caught in ranks.run(rank_fsdp1):
        assert lengths == [20, 20, 20]
        assert len(caught) == 1 and "FSDP1 keeps its gathered weights" in caught[0] and "use FSDP2" in caught[0]


def rank_apart(rank: int) -> tuple[Any, ...]:
    """One rank's model is called through another one in the last step of a cycle, so that it has no inputs."""
    model = llama()
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    optimizer.watch(model, process_group=torch.distributed.group.WORLD)
    seen = Seen(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(3 * EVERY):
            optimizer.zero_grad()
            hidden = rank == 1 and step == 2 * EVERY - 1
            (model.forward(**batch(step)) if hidden else model(**batch(step))).loss.backward()
            last = optimizer.last_jump
            optimizer.step()
            if optimizer.last_jump is not last:
                seen.add(optimizer.last_jump)
    return str(seen.reports), weights(model), seen.lengths, seen.kls


def test_a_rank_without_inputs_keeps_no_other_waiting(ranks: Ranks) -> None:
    """No longer jump than the last one, and than one without a trust region, is taken by any of them."""
    first, second = ranks.run(rank_apart)
    assert str(first) == str(second) and WORLD == 2
    lengths, kls = first[2:]
    assert lengths[1] == min(lengths[0], 20) and math.isnan(kls[1]) and kls[0] > 0 and kls[2] > 0


def in_parts_of_a_sequence(rank: int) -> tuple[list[float], list[str]]:
    from torch.distributed.tensor.experimental import context_parallel

    model = llama()
    model.set_attn_implementation("eager")  # torch's context_parallel has no attention of its own on a CPU
    optimizer = ExtraAdam(model.parameters(), **OPEN)
    optimizer.watch(model, process_group=torch.distributed.group.WORLD)
    mesh, lengths = init_device_mesh("cpu", (WORLD,)), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3 * EVERY):
            inputs = batch(step)
            parts = list(inputs.values())
            with context_parallel(mesh, buffers=parts, buffer_seq_dims=[1, 1], no_restore_buffers=set(parts)):
                assert inputs["input_ids"].shape == (2, 8 // WORLD)
                model(**inputs).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if (step + 1) % EVERY == 0:
                lengths.append(optimizer.last_jump.length)
    return lengths, [str(w.message) for w in caught if "extraopt" in str(w.message)]


def test_a_part_of_a_sequence_is_no_sequence(ranks: Ranks) -> None:
    """Outside of context_parallel attention looks at one rank's part, and outputs are of another model."""
    (lengths, said), other = ranks.run(in_parts_of_a_sequence)
    assert (lengths, said) == other and lengths == [20] * 3
    assert len(said) == 1 and "context_parallel, which has ended" in said[0]
