"""Four real ranks over gloo: uneven and empty shards, meshes of two dimensions, several meshes in one optimizer.

Functions called `rank_*` run on the ranks, the tests in the test process. All ranks see the same batch: the mean of
four equal gradients is exact, so whatever differs from a single process is ExtraAdam's doing. Whether AdamW itself is
then bit-equal to a single process is checked beside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim import AdamW, Optimizer

from extraopt import ExtraAdam, JumpReport

WORLD = 4
EVERY = 3
STEPS = 5 * EVERY
# steep enough that some tensors jump and others retreat
GATED: dict[str, Any] = {"lr": 0.05, "extra_every": EVERY, "extra_steps": 15, "extra_gate": 0.9, "extra_kl": None}
OPEN: dict[str, Any] = {**GATED, "extra_gate": None}
# Layouts, and whether AdamW's weights in them are those of one process, bit for bit. A tensor-parallel layer sums its
# products in another order, so there all is in float64 and compared to 9 digits.
LAYOUTS = {
    "shard": True,
    "bf16": True,
    "offload": True,
    "hsdp": True,
    "mixed": False,
    "fsdp of tensor-parallel": False,
}


@pytest.fixture(scope="module")
def pool() -> Iterator[list[Ranks]]:
    started: list[Ranks] = []
    yield started
    for ranks in started:
        ranks.close()


@pytest.fixture
def ranks(pool: list[Ranks], tmp_path_factory: pytest.TempPathFactory) -> Ranks:
    """The ranks of the test before, or new ones where it failed."""
    if not pool or not pool[-1].alive:
        pool.append(Ranks(str(tmp_path_factory.mktemp("ranks") / "store"), WORLD))
    return pool[-1]


def make_model(layout: str = "shard") -> nn.Module:
    torch.manual_seed(0)
    if LAYOUTS[layout]:  # over four ranks: 2, 2, 2 and 1 row, then 3, 2 and 1 row, so that one to three ranks have none
        layers = [nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3), nn.Tanh(), nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)]
        return nn.Sequential(*layers)
    pair = nn.Sequential(nn.Linear(7, 6), nn.Tanh(), nn.Linear(6, 3))
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), pair, nn.Tanh(), nn.Linear(3, 1)).double()


def spread(model: nn.Module, layout: str) -> nn.Module:
    """Lay the model out over the ranks."""
    if layout == "shard":
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer)
        return fully_shard(model)
    if layout == "bf16":
        return fully_shard(model, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    if layout == "offload":
        return fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    if layout == "hsdp":
        return fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model[2], mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if layout == "mixed":  # the first layer on all four ranks, the pair on each two of them, the last one a plain copy
        fully_shard(model[0])
        return model
    return fully_shard(model, mesh=mesh["data"])  # the pair is cut along two dimensions of one mesh


def in_bf16(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The forward pass of MixedPrecisionPolicy in one process."""

    def forward(x: Tensor) -> Tensor:
        weights = {name: p.bfloat16() for name, p in model.named_parameters()}
        return torch.func.functional_call(model, weights, (x.bfloat16(),))

    return forward


def local(t: Tensor) -> Tensor:
    return t.to_local() if hasattr(t, "to_local") else t


def whole(tensors: Any) -> list[Tensor]:
    return [(t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone() for t in tensors]


def assert_close(ours: list[Tensor], theirs: list[Tensor], exact: bool = True) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-9, equal_nan=True)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    steps: range,
    forward: Callable[[Tensor], Tensor] | None = None,
    poisoned: tuple[int, int, int] | None = None,
) -> tuple[list[JumpReport], list[str]]:
    """Train; the reports of the cycles that ended and what was warned of.

    `poisoned` is a step, a rank and a parameter: there the first gradient of the rank's own shard is NaN.
    """
    reports: list[JumpReport] = []
    dtype = next(model.parameters()).dtype
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            x, noise = torch.randn(8, 5, generator=generator), torch.randn(8, 1, generator=generator)
            x, noise = x.to(dtype), noise.to(dtype)
            model.zero_grad()
            ((forward or model)(x) - x.sum(1, keepdim=True) - 3 - noise).square().mean().backward()
            if poisoned is not None and poisoned[:2] == (step, torch.distributed.get_rank()):
                local(list(model.parameters())[poisoned[2]].grad).view(-1)[0] = torch.nan
            optimizer.step()
            report = getattr(optimizer, "last_jump", None)
            if report is not None and (not reports or reports[-1] is not report):
                reports.append(report)
    return reports, [str(w.message) for w in caught if "extraopt" in str(w.message)]


def assert_like(reports: list[JumpReport], expected: list[JumpReport]) -> None:
    """The decisions of one process, of which only sums over shards may be rounded in another order."""
    for report, one in zip(reports, expected, strict=True):
        assert (report.step, report.jumped, report.refused) == (one.step, one.jumped, one.refused)
        for name in "gate", "coherence", "drift_norm", "weight_norm":
            assert getattr(report, name) == pytest.approx(getattr(one, name), rel=1e-5, abs=1e-6), name


def rank_layout(rank: int, layout: str, hyperparameters: dict[str, Any]) -> tuple[list[JumpReport], list[list[int]]]:
    exact = LAYOUTS[layout]
    weights = {}
    for kind, options in ((AdamW, {"lr": hyperparameters["lr"]}), (ExtraAdam, hyperparameters)):
        model = spread(make_model(layout), layout)
        optimizer = kind(model.parameters(), **options)
        reports, _ = train(model, optimizer, range(STEPS))
        single = make_model(layout)
        alone = kind(single.parameters(), **options)
        expected, _ = train(single, alone, range(STEPS), in_bf16(single) if layout == "bf16" else None)
        weights[kind] = whole(model.parameters())
        assert_close(weights[kind], whole(single.parameters()), exact)
    assert_like(reports, expected)
    assert not any(torch.equal(a, e) for a, e in zip(weights[AdamW], weights[ExtraAdam])), "nothing was moved"
    for p, q in zip(model.parameters(), single.parameters()):
        for key in sorted({"extra_anchor", "extra_estimate"} & optimizer.state[p].keys()):  # all ranks gather alike
            state = optimizer.state[p][key]
            assert type(state) is type(p.data) and getattr(state, "placements", 0) == getattr(p, "placements", 0), key
            assert_close(whole([state]), [alone.state[q][key]], exact)
    return reports, [list(local(p).shape) for p in model.parameters()]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_jump_at_the_steps_and_by_the_gates_of_one_process(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(rank_layout, layout, GATED)
    reports = answers[0][0]
    assert all(repr(other) == repr(reports) for other, _ in answers), "ranks decided differently"
    assert [r.step for r in reports] == list(range(EVERY, STEPS + 1, EVERY))
    tensors = len(answers[0][1])
    assert any(0 < r.jumped < tensors for r in reports), "all jump or all retreat: that does not tell the tensors apart"
    assert all(0 < r.gate < 1 for r in reports[1:] if r.jumped)
    if layout in ("shard", "bf16", "offload"):
        rows = [[shapes[i][0] for _, shapes in answers] for i in range(0, tensors, 2)]
        assert rows == [[2, 2, 2, 1], [1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]], "no shard is uneven or empty"


def test_open_jumps_are_alike_on_ranks_with_empty_shards(ranks: Ranks) -> None:
    paper = {**OPEN, "extra_beta": 0.0}
    answers = ranks.run(rank_layout, "shard", paper)
    assert all(repr(other) == repr(answers[0][0]) for other, _ in answers)
    assert all(r.gate == 1 and r.jumped == 8 for r in answers[0][0])


def rank_by_hand(rank: int, layout: str) -> list[JumpReport | None]:
    """A jump that is called for in the middle of a cycle."""
    models = spread(make_model(layout), layout), make_model(layout)
    optimizers = [ExtraAdam(model.parameters(), **GATED) for model in models]
    seen: list[list[Any]] = [[], []]
    for step in range(4 * EVERY):
        for model, optimizer, events in zip(models, optimizers, seen):
            train(model, optimizer, range(step, step + 1))
            events.append(optimizer.jump() if step == 3 * EVERY + 1 else optimizer.last_jump)
    assert_close(whole(models[0].parameters()), whole(models[1].parameters()), LAYOUTS[layout])
    assert_like([r for r in seen[0] if r is not None], [r for r in seen[1] if r is not None])
    return seen[0]


@pytest.mark.parametrize("layout", ["hsdp", "mixed"])
def test_ranks_agree_on_a_jump_that_is_called_for(ranks: Ranks, layout: str) -> None:
    answers = ranks.run(rank_by_hand, layout)
    assert all(repr(answer) == repr(answers[0]) for answer in answers), "ranks decided differently"
    by_hand = answers[0][3 * EVERY + 1]
    assert by_hand.step == 3 * EVERY + 2 and by_hand.jumped > 0


def rank_poisoned(rank: int, layout: str, parameter: int) -> tuple[list[tuple[int, int, int]], list[str], list[bool]]:
    model = spread(make_model(layout), layout)
    optimizer = ExtraAdam(model.parameters(), **GATED)
    # in the last step of a cycle, so that the next forward pass has not yet spread it to every tensor
    reports, warned = train(model, optimizer, range(2 * EVERY), poisoned=(2 * EVERY - 1, 2, parameter))
    finite = [bool(w.isfinite().all()) for w in whole(model.parameters())]
    return [(r.step, r.jumped, r.refused) for r in reports], warned, finite


@pytest.mark.parametrize("layout, parameter, shape", [("shard", 0, (7, 5)), ("fsdp of tensor-parallel", 2, (6, 7))])
def test_ranks_agree_on_a_nan_in_one_shard(ranks: Ranks, layout: str, parameter: int, shape: tuple[int, int]) -> None:
    answers = ranks.run(rank_poisoned, layout, parameter)
    reports, warned, finite = answers[0]
    assert all(repr(answer) == repr(answers[0]) for answer in answers), "ranks decided differently"
    assert reports[0][2] == 0 and reports[1][1] > 0 and reports[1][2] == 1
    assert len(warned) == 1 and f"1 of {len(finite)} tensors" in warned[0] and f"shape {shape}" in warned[0]
    assert finite == [i != parameter for i in range(len(finite))]


def rank_dcp(rank: int, folder: str, saved: int, loaded: int) -> list[JumpReport]:
    """Save on the first ranks, load on others of the first; what one process does all along."""
    meshes = {n: DeviceMesh("cpu", list(range(n))) for n in (1, 2, 4)}  # on all ranks, as new groups have to be
    half = EVERY + 1  # in the middle of the second cycle

    def make(
        world: int, hyperparameters: dict[str, Any]
    ) -> tuple[nn.Module, ExtraAdam, dict[str, Any], dict[str, Any]]:
        model = make_model()
        if world > 1:
            fully_shard(model, mesh=meshes[world])
        where = {"no_dist": True} if world == 1 else {"process_group": meshes[world].get_group()}
        return model, ExtraAdam(model.parameters(), **hyperparameters), where, {"checkpoint_id": folder}

    if rank < saved:
        model, optimizer, where, path = make(saved, GATED)
        train(model, optimizer, range(half))
        weights, state = dcp_state_dict.get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, **path, **where)
    torch.distributed.barrier()
    if rank >= loaded:
        return []
    model, optimizer, where, path = make(loaded, {**GATED, "lr": 0.5, "extra_steps": 100})
    for p in model.parameters():
        nn.init.constant_(p, 0.5)
    weights, state = dcp_state_dict.get_state_dict(model, optimizer)
    found = {"model": weights, "optimizer": state}
    dcp.load(found, **path, **where)
    dcp_state_dict.set_state_dict(
        model, optimizer, model_state_dict=found["model"], optim_state_dict=found["optimizer"]
    )
    reports, _ = train(model, optimizer, range(half, STEPS))

    single = make_model()
    expected, _ = train(single, ExtraAdam(single.parameters(), **GATED), range(STEPS))
    assert_close(whole(model.parameters()), whole(single.parameters()))
    assert_like(reports, expected[1:])
    return reports


@pytest.mark.parametrize("saved, loaded", [(4, 2), (4, 1), (2, 4), (1, 4)])
def test_a_checkpoint_resumes_on_another_number_of_ranks(ranks: Ranks, tmp_path: Path, saved: int, loaded: int) -> None:
    answers = ranks.run(rank_dcp, str(tmp_path / "checkpoint"), saved, loaded)
    assert all(repr(answer) == repr(answers[0]) for answer in answers[:loaded])
    assert [r.step for r in answers[0]] == list(range(2 * EVERY, STEPS + 1, EVERY)) and answers[0][-1].jumped > 0


def rank_zero_redundancy(rank: int) -> int:
    model = make_model()
    optimizer = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=ExtraAdam, **OPEN)
    train(model, optimizer, range(STEPS))
    single = make_model()
    train(single, ExtraAdam(single.parameters(), **OPEN), range(STEPS))
    assert_close(whole(model.parameters()), whole(single.parameters()))
    inner = optimizer.optim
    assert inner.last_jump.step == STEPS and inner.last_jump.jumped == len(inner.state)
    return len(inner.state)


def test_zero_redundancy_optimizer_on_four_ranks_keeps_to_the_path_of_one_process(ranks: Ranks) -> None:
    owned = ranks.run(rank_zero_redundancy)
    assert sum(owned) == 8 and min(owned) > 0
