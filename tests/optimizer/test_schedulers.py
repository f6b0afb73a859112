"""torch's learning-rate schedulers around ExtraAdam: all of them, stopped and resumed at any step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pickle import UnpicklingError
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, RULES, K, assert_same, assert_same_run, batch_loss, reload, rule_name, tiny_model
from test_wrap import SCHEDULERS
from torch.optim import AdamW, lr_scheduler, swa_utils
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler, ReduceLROnPlateau, SequentialLR

from extraopt import ExtraAdam

STEPS = 11
# SequentialLR's own
pytestmark = pytest.mark.filterwarnings("error", "ignore:The epoch parameter in `scheduler.step")


def skip_without_plain_state(name: str) -> None:
    """Before torch 2.10 SWALR's state holds a function."""
    scheduler = SCHEDULERS[name](AdamW(tiny_model().parameters()))
    try:
        reload(scheduler.state_dict())
    except UnpicklingError:
        pytest.skip(f"no checkpoint read with weights_only holds the {name} of torch {torch.__version__}")


class Scheduled:
    """A model, its optimizer and a scheduler, stepped as torch's documentation has it."""

    def __init__(
        self, make: Callable[[Any], LRScheduler], lr: Any = 0.01, kind: Any = ExtraAdam, **hyperparameters: Any
    ) -> None:
        self.model = tiny_model()
        self.optimizer = kind(
            self.model.parameters(), lr=lr.clone() if isinstance(lr, torch.Tensor) else lr, **hyperparameters
        )
        self.scheduler = make(self.optimizer)
        self.lrs: list[float] = []  # of each step
        self.ends: list[int] = []  # steps that ended a cycle
        self.states: list[dict[str, Any]] = []  # before each step

    def train(self, steps: Iterable[int]) -> Scheduled:
        for i in steps:
            self.states.append(reload(self.state()))
            self.lrs.append(float(self.optimizer.param_groups[0]["lr"]))
            self.optimizer.zero_grad()
            batch_loss(self.model, i).backward()
            before = getattr(self.optimizer, "last_jump", None)
            self.optimizer.step()
            if getattr(self.optimizer, "last_jump", None) is not before:
                self.ends.append(i + 1)
            # a loss that falls at first, the same in every run
            self.scheduler.step(*([max(0.5, 1 - i / 4)] if isinstance(self.scheduler, ReduceLROnPlateau) else []))
        return self

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler}
        return {name: part.state_dict() for name, part in parts.items()}

    def resume(self, state: dict[str, Any]) -> Scheduled:
        for name in state:
            getattr(self, name).load_state_dict(state[name])
        return self


def test_torch_has_a_scheduler_that_is_not_tried() -> None:
    members = [*vars(lr_scheduler).values(), *vars(swa_utils).values()]
    found = {kind.__name__ for kind in members if isinstance(kind, type) and issubclass(kind, LRScheduler)}
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize(
    "lr", [0.01, pytest.param(torch.tensor(0.01), marks=pytest.mark.slow)], ids=["number", "tensor"]
)
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_scheduled_run_counts_other_steps_or_resumes_with_another_path(
    name: str, rule: dict[str, Any], lr: Any
) -> None:
    """Learning rates are AdamW's under the same schedule; cycles are counted in steps of the optimizer."""
    skip_without_plain_state(name)
    theirs = Scheduled(SCHEDULERS[name], lr, AdamW).train(range(STEPS))
    whole = Scheduled(SCHEDULERS[name], lr, **rule).train(range(STEPS))
    assert whole.lrs == theirs.lrs and len(set(whole.lrs)) > 1
    assert whole.ends == [3, 6, 9] and whole.optimizer.last_jump.step == 9
    assert {int(state["step"]) for state in whole.optimizer.state.values()} == {STEPS}
    for stop in (4, 6):  # within a cycle, and right after a jump
        resumed = Scheduled(SCHEDULERS[name], lr, **rule).resume(whole.states[stop]).train(range(stop, STEPS))
        assert resumed.lrs == whole.lrs[stop:] and resumed.ends == [end for end in whole.ends if end > stop]
        assert_same_run(whole.model, whole.optimizer, resumed.model, resumed.optimizer)
        # not that of the whole run: before torch 2.10 SequentialLR resumes with another first lr, if that is a tensor
        resumed_theirs = Scheduled(SCHEDULERS[name], lr, AdamW).resume(theirs.states[stop]).train(range(stop, STEPS))
        assert_same(resumed.scheduler.state_dict(), resumed_theirs.scheduler.state_dict())


@pytest.mark.parametrize("held", [1, 2, 3, 4])
@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_a_run_that_stands_at_the_start_of_its_warm_up_is_resumed_with_another_anchor(
    rule: dict[str, Any], held: int
) -> None:
    """Some steps with lr 0, a ramp, then a cosine: from a state of any step the same weights are reached."""

    def make(optimizer: Any) -> LRScheduler:
        ramp = LambdaLR(optimizer, lambda t: max(0.0, (t + 1 - held) / 4))
        return SequentialLR(optimizer, [ramp, CosineAnnealingLR(optimizer, 8)], [6])

    whole = Scheduled(make, **rule).train(range(STEPS))
    start = tiny_model().state_dict()
    assert whole.lrs[:held] == [0.0] * held and 0.0 not in whole.lrs[held:]
    assert_same([dict(state["model"]) for state in whole.states[: held + 1]], [dict(start)] * (held + 1))
    assert whole.ends == [3, 6, 9] and whole.optimizer.last_jump.jumped > 0
    for stop in range(1, STEPS):
        resumed = Scheduled(make, **rule).resume(whole.states[stop]).train(range(stop, STEPS))
        assert_same_run(whole.model, whole.optimizer, resumed.model, resumed.optimizer)


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_weights_move_after_a_schedule_has_ended_at_zero(rule: dict[str, Any]) -> None:
    """The cycle in which it got there may jump; the next ones have no drift of their own."""
    run = Scheduled(lambda o: LambdaLR(o, lambda t: 1.0 if t < 2 * K - 1 else 0.0), **rule).train(range(4 * K))
    before, there, *after = [state["model"] for state in run.states[2 * K - 1 :]] + [run.state()["model"]]
    assert run.ends == [3, 6, 9, 12] and not torch.equal(before["0.weight"], there["0.weight"])
    for weights in after:
        assert_same(dict(weights), dict(there))


def test_a_group_that_its_schedule_holds_still_shifts_the_other() -> None:
    """As in gradual unfreezing by learning rates: two groups in one optimizer go as they would in two."""
    late, early = (lambda t: float(t >= 4)), (lambda t: 0.9**t)
    hyperparameters: list[dict[str, Any]] = [{**GATED, "lr": 0.02}, {**PAPER, "extra_every": 4, "lr": 0.01}]

    def run(together: bool) -> tuple[torch.nn.Module, list[torch.optim.Optimizer]]:
        model = tiny_model()
        groups = [{"params": list(model[i].parameters()), **options} for i, options in zip((0, 2), hyperparameters)]
        optimizers = [ExtraAdam(groups)] if together else [ExtraAdam([group]) for group in groups]
        schedulers = (
            [LambdaLR(optimizers[0], [late, early])]
            if together
            else [LambdaLR(optimizer, [rate]) for optimizer, rate in zip(optimizers, (late, early))]
        )
        for i in range(14):
            model.zero_grad()
            batch_loss(model, i).backward()
            for stepped in (*optimizers, *schedulers):
                stepped.step()
        return model, optimizers

    (ours, together), (theirs, apart) = run(True), run(False)
    assert_same([*ours.parameters()], [*theirs.parameters()])
    for p, q in zip(ours.parameters(), theirs.parameters()):
        assert_same(together[0].state[p], next(o.state[q] for o in apart if q in o.state))
    assert together[0].last_jump.step == 12 and together[0].last_jump.jumped == 4  # both groups' cycles ended there


@pytest.mark.parametrize("rule", RULES, ids=rule_name)
def test_averaged_weights_that_are_swapped_in_and_out_change_the_run(rule: dict[str, Any]) -> None:
    """torch.optim.swa_utils: an evaluation of the average in mid-cycle, after which the weights are put back."""
    skip_without_plain_state("SWALR")

    def run(swap: bool) -> tuple[Scheduled, list[float]]:
        one = Scheduled(SCHEDULERS["SWALR"], **rule)
        average, seen = swa_utils.AveragedModel(one.model), []
        for i in range(STEPS):
            one.train([i])
            average.update_parameters(one.model)
            if swap:
                kept = {name: p.detach().clone() for name, p in one.model.named_parameters()}
                one.model.load_state_dict(average.module.state_dict())
                seen.append(batch_loss(one.model, 0).item())
                one.model.load_state_dict(kept)
        return one, seen

    (plain, _), (swapped, seen) = run(False), run(True)
    assert len(set(seen)) == STEPS
    assert_same_run(plain.model, plain.optimizer, swapped.model, swapped.optimizer)
