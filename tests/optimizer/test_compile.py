"""A compiled step: AdamW's graph and no more, compiled once, with the jumps of the eager step."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from contract import EVERY, HYPERPARAMETERS, Make, assert_same, clones, give_gradients, parameters
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import ExponentialLR

from extraopt import ExtraAdam

RULES: dict[str, Make] = {
    "gated": partial(ExtraAdam, **HYPERPARAMETERS),
    "paper": partial(ExtraAdam, **HYPERPARAMETERS, extra_beta=0.0, extra_gate=None),
}
STEPS = 3 * EVERY + 2


@pytest.fixture(autouse=True)
def forget_compiled() -> None:
    torch._dynamo.reset()


def assert_close(ours: list[Parameter], theirs: list[Parameter]) -> None:
    # a traced AdamW computes its bias corrections in tensors, an eager one in Python floats
    for p, q in zip(ours, theirs):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def run(optimizer: Optimizer, params: list[Parameter], step: Callable[[], Any], counter: CompileCounter) -> list[int]:
    """STEPS steps under a scheduler; how many graphs there were after each."""
    scheduler = ExponentialLR(optimizer, 0.9)
    graphs = []
    for i in range(STEPS):
        give_gradients(params, i)
        step()
        scheduler.step()
        graphs.append(counter.frame_count)
    return graphs


@pytest.mark.parametrize("flags", [{}, {"lr": 0.01, "foreach": True}], ids=str)
def test_compiles_what_adamw_compiles_and_no_more(flags: dict[str, Any]) -> None:
    """torch's tracer takes a plain number in a state for a constant until it has seen it change."""
    counts = []
    for make in RULES["gated"], AdamW:
        torch._dynamo.reset()
        params, counter = parameters(), CompileCounter()
        optimizer = make(params, **{"lr": torch.tensor(0.01), **flags})
        graphs = run(optimizer, params, torch.compile(lambda o=optimizer: o.step(), backend=counter), counter)
        assert graphs[0] == 1 and graphs[2:] == graphs[1:-1], f"recompiled: {graphs}"
        counts.append((graphs, counter.op_count / graphs[-1]))
    assert counts[0][0] == counts[1][0]
    assert abs(counts[0][1] - counts[1][1]) < 1, "more operations in a graph than AdamW has"


@pytest.mark.parametrize(
    ("rule", "flags"),
    [("gated", {}), ("gated", {"fused": True}), ("paper", {"amsgrad": True, "maximize": True})],
    ids=str,
)
def test_jumps_like_the_eager_step(rule: str, flags: dict[str, Any]) -> None:
    ours, theirs = parameters(), parameters()
    compiled = RULES[rule](ours, **{**flags, "lr": torch.tensor(0.01)})
    eager = RULES[rule](theirs, **{**flags, "lr": torch.tensor(0.01)})
    step = torch.compile(lambda: compiled.step(), backend=CompileCounter())
    reports = []
    for i in range(STEPS):
        give_gradients(ours, i)
        give_gradients(theirs, i)
        step()
        eager.step()
        assert_close(ours, theirs)
        pair = compiled.last_jump, eager.last_jump
        assert (pair[0] is None) == (pair[1] is None) == (i + 1 < EVERY)
        if pair[0] is not None:
            assert (pair[0].step, pair[0].gate, pair[0].jumped) == (pair[1].step, pair[1].gate, pair[1].jumped)
            reports.append(pair[0].jumped)
    assert reports[-1] > 0


def test_bound_step_compiled_under_a_scheduler() -> None:
    """A scheduler replaces `optimizer.step` on the instance; what is compiled is then the scheduler's wrapper."""
    ours, theirs = parameters(), parameters()
    compiled, eager = (RULES["gated"](p, lr=torch.tensor(0.01)) for p in (ours, theirs))
    schedulers = [ExponentialLR(o, 0.9) for o in (compiled, eager)]
    step = torch.compile(compiled.step, backend=CompileCounter())
    for i in range(STEPS):
        give_gradients(ours, i)
        give_gradients(theirs, i)
        step()
        eager.step()
        for scheduler in schedulers:
            scheduler.step()
        assert_close(ours, theirs)
    assert compiled.last_jump.step == 3 * EVERY


def test_closure_runs_once_a_step_and_before_the_anchor() -> None:
    def closure(optimizer: Optimizer, params: list[Parameter], calls: list[int]) -> Tensor:
        optimizer.zero_grad()
        loss = sum(((p - 3.0) ** 2).sum() for p in params)
        loss.backward()
        calls.append(1)
        return loss

    ours, theirs = parameters(), parameters()
    compiled, eager = RULES["paper"](ours), RULES["paper"](theirs)
    calls: list[int] = []
    inner = partial(closure, compiled, ours, calls)
    step = torch.compile(lambda: compiled.step(inner), backend=CompileCounter())
    for i in range(STEPS):
        loss = step()
        expected = eager.step(partial(closure, eager, theirs, []))
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
        assert_close(ours, theirs)
        assert len(calls) == i + 1


def test_state_of_a_compiled_optimizer_resumes_eagerly() -> None:
    whole, first = parameters(), parameters()
    make = RULES["gated"]
    uninterrupted, interrupted = make(whole), make(first)
    for optimizer, params in (uninterrupted, whole), (interrupted, first):
        step = torch.compile(lambda o=optimizer: o.step(), backend=CompileCounter())
        for i in range(EVERY + 1):
            give_gradients(params, i)
            step()
    second = clones(first)
    resumed = make(second)
    resumed.load_state_dict(copy.deepcopy(interrupted.state_dict()))
    for i in range(EVERY + 1, STEPS):
        for optimizer, params in (uninterrupted, whole), (resumed, second):
            give_gradients(params, i)
            optimizer.step()
    assert_same(second, whole, "resumed without compile")
