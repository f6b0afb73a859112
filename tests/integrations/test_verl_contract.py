"""verl's FSDP engine with `optimizer_impl: extraopt`: what it does around an optimizer, in its order.

Told after verl-project/verl at commit 1dda039b9c6311889a9c9a26040677e1254814f9:

- `build_optimizer` in verl/workers/config/optimizer.py: keywords from the configuration, the override last. Where verl
  is installed its own function builds the optimizer here.
- `_build_lr_scheduler`, `optimizer_step`, `save_checkpoint` and `load_checkpoint` of `FSDPEngine` in
  verl/workers/engine/fsdp/transformer_impl.py, with the schedules of verl/utils/torch_functional.py: a warm-up begins
  at a learning rate of 0, and a step with a norm of gradients that is not finite is left out.
- `offload_fsdp_optimizer` and `load_fsdp_optimizer` in verl/utils/fsdp_utils.py: every tensor of the state is replaced
  by another one between steps, and a parameter without a state gets an empty one.
- `FSDPCheckpointManager` in verl/utils/checkpoint/fsdp_checkpoint_manager.py: the state dict of each rank, pickled as
  it is, loaded after the weights and before the schedule.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, K, assert_same, assert_same_run, batch_loss, tiny_model
from ranks import Ranks
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim.lr_scheduler import LambdaLR

from extraopt import ExtraAdam, JumpReport

LR = 0.01
ADAMW: dict[str, Any] = {"optimizer_impl": "torch.optim", "optimizer": "AdamW", "override_optimizer_config": None}


def config(**options: Any) -> SimpleNamespace:
    """The part of verl's FSDPOptimizerConfig that is read for an optimizer; betas come out of YAML as a list."""
    ours = {"optimizer_impl": "extraopt", "optimizer": "ExtraAdam", "override_optimizer_config": dict(GATED)}
    return SimpleNamespace(**{"lr": LR, "weight_decay": 0.01, "betas": [0.9, 0.999], **ours, **options})


def build_optimizer(params: Iterable[Tensor], config: SimpleNamespace) -> Any:
    if find_spec("verl"):
        return importlib.import_module("verl.workers.config.optimizer").build_optimizer(params, config)
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if "adam" in config.optimizer.lower():
        options["betas"] = config.betas
    options.update(config.override_optimizer_config or {})
    return getattr(importlib.import_module(config.optimizer_impl), config.optimizer)(params, **options)


def warmed_up(optimizer: torch.optim.Optimizer, kind: str, warmup: int = 2, total: int = 20) -> LambdaLR:
    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return 1.0 if kind == "constant" else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return LambdaLR(optimizer, factor)


def move_state(optimizer: torch.optim.Optimizer) -> None:
    """To the CPU and back, as far as the optimizer can tell: each tensor of its state is another one than before."""
    if not optimizer.state:
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]  # of a defaultdict: made here, and left empty, where there is none
            for key, value in state.items():
                if isinstance(value, Tensor):
                    state[key] = value.clone()
                    value.fill_(torch.nan)  # whoever still reads the old one shall notice


class Engine:
    """A model, its optimizer and its schedule, in the hands of a worker of verl's."""

    def __init__(self, seed: int = 0, offload: bool = False, warmup: str | None = None, **options: Any) -> None:
        self.model, self.offload = tiny_model(seed), offload
        self.optimizer = build_optimizer(self.model.parameters(), config(**options))
        self.schedule = warmed_up(self.optimizer, warmup) if warmup else None
        self.reports: list[JumpReport] = []

    def step(self, number: int, bad: bool = False) -> None:
        self.optimizer.zero_grad()
        batch_loss(self.model, number).backward()
        if bad:
            self.model[0].weight.grad[0, 0] = torch.inf
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), max_norm=1.0)
        if norm.isfinite():
            self.optimizer.step()
        else:
            self.optimizer.zero_grad()
        self.look()

    def look(self) -> None:
        last = getattr(self.optimizer, "last_jump", None)
        if last is not None and (not self.reports or self.reports[-1] is not last):
            self.reports.append(last)

    def train(self, steps: Iterable[int], bad: Iterable[int] = (), iteration: int = 1, jump: bool = False) -> None:
        """Iterations of some optimizer steps each; the state is on the device only during one."""
        for number in steps:
            self.step(number, number in bad)
            if (number + 1) % iteration == 0:
                if jump:
                    self.optimizer.jump()
                    self.look()
                if self.schedule is not None:
                    self.schedule.step()
                if self.offload:
                    move_state(self.optimizer)

    def save(self, folder: Path) -> None:
        torch.save(self.model.state_dict(), folder / "model.pt")
        torch.save(self.optimizer.state_dict(), folder / "optim.pt")
        torch.save({"lr_scheduler": self.schedule and self.schedule.state_dict()}, folder / "extra_state.pt")

    def load(self, folder: Path) -> None:
        self.model.load_state_dict(torch.load(folder / "model.pt", weights_only=False))
        self.optimizer.load_state_dict(torch.load(folder / "optim.pt", weights_only=False))
        schedule = torch.load(folder / "extra_state.pt", weights_only=False)["lr_scheduler"]
        if self.schedule is not None and schedule is not None:
            self.schedule.load_state_dict(schedule)
        if self.offload:
            move_state(self.optimizer)


def same_run(ours: Engine, theirs: Engine) -> None:
    assert_same_run(ours.model, ours.optimizer, theirs.model, theirs.optimizer)


def ends(engine: Engine) -> list[int]:
    return [report.step for report in engine.reports]


def test_a_configuration_of_names_and_overrides_is_refused_or_dropped():
    hyperparameters = {
        "extra_every": 20,
        "extra_steps": 99,
        "extra_beta": 0.0,
        "extra_gate": None,
        "extra_start": 3,
        "eps": 1e-6,
    }
    optimizer = build_optimizer(tiny_model().parameters(), config(override_optimizer_config=hyperparameters))
    (group,) = optimizer.param_groups
    assert type(optimizer) is ExtraAdam
    assert {key: group[key] for key in hyperparameters} == hyperparameters
    assert group["lr"] == LR and group["weight_decay"] == 0.01 and list(group["betas"]) == [0.9, 0.999]
    defaults = ExtraAdam(tiny_model().parameters()).param_groups[0]
    (group,) = build_optimizer(tiny_model().parameters(), config(override_optimizer_config=None)).param_groups
    assert all(group[key] == defaults[key] for key in hyperparameters)


def test_a_misspelt_override_trains_without_it():
    with pytest.raises(TypeError, match="extra_step"):
        build_optimizer(tiny_model().parameters(), config(override_optimizer_config={"extra_step": 100}))
    with pytest.raises(ValueError, match="extra_every"):
        build_optimizer(tiny_model().parameters(), config(override_optimizer_config={"extra_every": 0}))


@pytest.mark.parametrize("rule", [PAPER, GATED], ids=["paper", "gated"])
@pytest.mark.parametrize("iteration", [1, 2])
def test_a_state_that_is_offloaded_between_steps_takes_another_path(iteration: int, rule: dict[str, Any]):
    here, moved = Engine(override_optimizer_config=rule), Engine(offload=True, override_optimizer_config=rule)
    here.train(range(14), iteration=iteration)
    moved.train(range(14), iteration=iteration)
    assert ends(moved) == [3, 6, 9, 12] and moved.reports == here.reports and moved.reports[-1].jumped > 0
    same_run(here, moved)


@pytest.mark.parametrize("jump", [False, True])
def test_a_parameter_without_gradients_is_given_an_empty_state_and_fails_later(tmp_path: Path, jump: bool):
    def train(engine: Engine, steps: range) -> None:
        for number in steps:  # a part that is frozen for the first iterations
            engine.model[2].requires_grad_(number >= 4)
            engine.train([number], jump=jump)

    engines = Engine(), Engine(offload=True)
    for engine in engines:
        train(engine, range(4))
    late = engines[1].model[2].weight
    assert engines[1].optimizer.state[late] == {} and late not in engines[0].optimizer.state
    engines[1].save(tmp_path)
    resumed = Engine(seed=1, offload=True)
    resumed.load(tmp_path)
    for engine in (*engines, resumed):
        train(engine, range(4, 12))
    same_run(*engines)
    same_run(engines[0], resumed)
    steps = {int(state["step"]) for state in resumed.optimizer.state.values()}
    assert steps == {8, 12} and resumed.reports[-1].jumped > 0


@pytest.mark.parametrize("offload", [False, True])
def test_a_jump_at_the_end_of_an_iteration_is_not_that_of_its_steps(offload: bool):
    """As OpenRLHF's actors would call it: after the last mini-batch, before weights go to the inference engine."""
    engine = Engine(offload=offload, override_optimizer_config={**PAPER, "extra_every": 100, "extra_steps": 200})
    done = 0
    for steps in (3, 2, 4):  # of an iteration, which filters its prompts
        before = [p.detach().clone() for p in engine.model.parameters()]
        engine.train(range(done, done + steps))
        landed = [p.detach().clone() for p in engine.model.parameters()]
        report = engine.optimizer.jump()
        done += steps
        assert report.step == done and report.jumped == 4 and report.refused == 0
        for p, e, a in zip(engine.model.parameters(), landed, before):
            torch.testing.assert_close(p.detach(), e + 2 * (e - a), rtol=1e-5, atol=1e-7)
            assert_same(engine.optimizer.state[p]["extra_anchor"], p.detach())
        assert engine.optimizer.jump() is None, "the engine would sample from weights that training has left"
        if offload:
            move_state(engine.optimizer)


def test_gated_jumps_by_hand_differ_where_the_state_is_offloaded():
    here, moved = Engine(), Engine(offload=True)
    for engine in here, moved:
        engine.train(range(16), iteration=2, jump=True)  # never the 3 steps of a cycle
        assert ends(engine) == list(range(2, 17, 2))
    assert moved.reports == here.reports and moved.reports[-1].jumped > 0
    same_run(here, moved)


@pytest.mark.parametrize("kind", ["constant", "cosine"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_warm_up_from_a_learning_rate_of_zero_shifts_the_cycles(offload: bool, kind: str):
    engine, adamw = Engine(offload=offload, warmup=kind), Engine(warmup=kind, **ADAMW)
    engine.train(range(K))
    adamw.train(range(K))
    assert_same(list(engine.model.parameters()), list(adamw.model.parameters()))
    for p, start in zip(
        engine.model.parameters(), tiny_model().parameters()
    ):  # the first drift is the estimate, and all steps count
        estimate = engine.optimizer.state[p]["extra_estimate"]
        torch.testing.assert_close(estimate, (p - start).detach(), rtol=1e-4, atol=1e-8)
    engine.train(range(K, 4 * K))
    assert ends(engine) == [K, 2 * K, 3 * K, 4 * K] and engine.reports[-1].jumped > 0


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("stop", [1, K + 1, 2 * K])
def test_a_resumed_worker_takes_another_path(tmp_path: Path, stop: int, offload: bool):
    """After one step, which a warm-up makes with a learning rate of 0, in the middle of a cycle, and at its end."""
    # each schedule has set its learning rate to 0 before anything is loaded
    whole, stopped, resumed = (Engine(seed, offload, warmup="cosine") for seed in (0, 0, 1))
    whole.train(range(13))
    stopped.train(range(stop))
    stopped.save(tmp_path)
    resumed.load(tmp_path)
    resumed.train(range(stop, 13))
    same_run(whole, resumed)
    assert resumed.reports == [report for report in whole.reports if report.step > stop]
    assert resumed.reports[-1].jumped > 0
    assert resumed.schedule.get_last_lr() == whole.schedule.get_last_lr()


def test_a_run_begun_by_adamw_cannot_be_resumed_by_extraadam(tmp_path: Path):
    adamw = Engine(**ADAMW)
    adamw.train(range(4))
    adamw.save(tmp_path)
    resumed = Engine(seed=1, offload=True)
    resumed.load(tmp_path)
    resumed.train(range(4, 4 + K - 1))
    adamw.train(range(4, 4 + K - 1))
    assert_same(list(resumed.model.parameters()), list(adamw.model.parameters()))
    resumed.train(range(4 + K - 1, 13))
    assert ends(resumed) == [4 + K, 4 + 2 * K, 4 + 3 * K] and resumed.reports[-1].jumped > 0


def test_a_step_left_out_for_its_gradients_counts_towards_the_cycle():
    engine = Engine(offload=True)
    engine.train(range(5), bad={1, 3})
    assert ends(engine) == [3] and all(int(s["step"]) == 3 for s in engine.optimizer.state.values())
    clean = Engine()
    clean.train([0, 2, 4])
    same_run(engine, clean)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(str(tmp_path / "store"))
    yield ranks
    ranks.close()


class Sharded(Engine):
    """The same over ranks, by FSDP2: one file for each rank, of DTensors."""

    def __init__(self, rank: int, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model, self.rank = fully_shard(self.model), rank
        self.optimizer = build_optimizer(self.model.parameters(), config())

    def file(self, folder: str) -> Path:
        path = Path(folder, f"rank_{self.rank}")
        path.mkdir(parents=True, exist_ok=True)
        return path


def rank_offload(rank: int, folder: str) -> list[JumpReport]:
    whole, stopped, resumed = (Sharded(rank, seed, offload=True) for seed in (0, 0, 1))
    whole.train(range(8))
    whole.optimizer.reset_anchor()
    whole.train(range(8, 14))
    stopped.train(range(4))
    stopped.save(stopped.file(folder))
    resumed.load(resumed.file(folder))
    resumed.train(range(4, 8))
    resumed.optimizer.reset_anchor()  # copies weights into anchors that came out of a file, mesh and all
    resumed.train(range(8, 14))
    single = Engine()
    single.train(range(8))
    single.optimizer.reset_anchor()
    single.train(range(8, 14))
    for p, q, s in zip(whole.model.parameters(), resumed.model.parameters(), single.model.parameters()):
        assert_same(q.to_local(), p.to_local())
        # the norm that gradients are clipped to is a sum over shards, so single processes round it otherwise
        torch.testing.assert_close(p.full_tensor(), s, rtol=1e-5, atol=1e-6)
    assert resumed.reports == whole.reports[1:] and ends(whole) == ends(single)
    assert [r.jumped for r in whole.reports] == [r.jumped for r in single.reports]
    return whole.reports


def test_shards_that_are_offloaded_or_pickled_rank_by_rank_take_another_path(ranks: Ranks, tmp_path: Path):
    first, second = ranks.run(rank_offload, str(tmp_path / "checkpoint"))
    assert list(map(repr, first)) == list(map(repr, second)) and first[-1].jumped > 0
    assert [report.step for report in first] == [3, 6, 11, 14]


def packed(step: int) -> dict[str, Any]:
    """Two sequences in one row, as verl's actor gives them once padding is removed: positions tell them apart."""
    ids = (torch.arange(14) * (step % 5 + 1) + step) % 13 + 3
    positions = torch.cat([torch.arange(8), torch.arange(6)])
    return {"input_ids": ids[None], "attention_mask": None, "position_ids": positions[None], "use_cache": False}


def test_an_actor_is_guarded_by_a_configuration_alone():
    """`DataParallelPPOActor` in verl/workers/actor/dp_actor.py: log-probabilities of the old policy without gradients
    and in eval mode, then the update under autocast, with logits divided by the temperature in place."""
    pytest.importorskip("transformers", reason="needs transformers: pip install 'extraopt[hf]'")
    from test_bugs_trainers import llama

    actor = llama()
    optimizer = build_optimizer(actor.parameters(), config(lr=1e-3, override_optimizer_config=None))
    assert type(optimizer) is ExtraAdam
    reports = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(25):
            inputs = packed(step)
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                old = actor.eval()(**inputs).logits.float().log_softmax(-1)
            actor.train()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                logits = actor(**inputs).logits
                logits.div_(0.7)
            new = logits.float().log_softmax(-1)
            chosen = inputs["input_ids"].roll(-1, 1)[..., None]
            advantage = torch.linspace(-1, 1, 14)
            ratio = (new.gather(-1, chosen) - old.gather(-1, chosen))[..., 0].exp()
            (-advantage * ratio).mean().backward()
            nn.utils.clip_grad_norm_(actor.parameters(), 1.0)
            optimizer.step()
            move_state(optimizer)
            if optimizer.last_jump is not None and optimizer.last_jump.step == step + 1:
                reports.append(optimizer.last_jump)
    assert [report.step for report in reports] == [5, 10, 15, 20, 25]
    measured = [report for report in reports if report.length > 0]
    assert measured and all(0 < report.kl <= 0.02 and report.fall <= 0.8 for report in measured)
    assert not [w for w in caught if "extraopt" in str(w.message)] and actor.training
