"""report(): a jump that made things worse is taken back."""

from __future__ import annotations

import copy
import random
import warnings

import pytest
import torch
from helpers import PAPER, assert_same, reload
from torch.nn import Parameter

from extraopt import ExtraAdam

KNOBS = {"lr": 0.01, "betas": (0.0, 0.99), "weight_decay": 0.0, "extra_every": 5, "extra_steps": 20}


def step(params: list[Parameter], optimizer: ExtraAdam, slope: float = -1.0) -> None:
    for p in params:
        p.grad = torch.full_like(p, slope)
    optimizer.step()


def jumped(metric: float = 0.6, dtype: torch.dtype = torch.float32) -> tuple[list[Parameter], ExtraAdam, list]:
    """Two cycles along a straight line, `metric` reported before each step; the weights before the jump."""
    params = [Parameter(torch.zeros(4, dtype=dtype)), Parameter(torch.ones(2, 3, dtype=dtype))]
    optimizer = ExtraAdam(params, **KNOBS)
    for i in range(10):
        if i == 9:
            twin = [p.detach().clone() for p in params]
            shadow = torch.optim.AdamW(twin, lr=0.01, betas=(0.0, 0.99), weight_decay=0.0)
            shadow.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            step(twin, shadow)
        assert not optimizer.report(metric + 0.01 * (-1) ** i)
        step(params, optimizer)
    assert optimizer.last_jump.jumped == 2 and float((params[0].detach() - twin[0]).min()) > 0.02
    return params, optimizer, twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_jump_that_made_things_worse_is_taken_back_and_the_steps_since_are_kept(dtype: torch.dtype) -> None:
    params, optimizer, before = jumped(dtype=dtype)
    landed = [p.detach().clone() for p in params]
    for i in range(3):
        step(params, optimizer, slope=1.0)
        steps_since = [p.detach() - w for p, w in zip(params, landed)]
        if i < 2:
            assert not optimizer.report(0.3 + 0.01 * (-1) ** i)
    with pytest.warns(RuntimeWarning, match=r"fell from 0.598 to 0.3 after the last jump.*50% as long"):
        assert optimizer.report(0.3)
    for p, w, since in zip(params, before, steps_since):
        torch.testing.assert_close(p.detach(), w + since, rtol=0, atol=4 * torch.finfo(dtype).eps)
    assert not optimizer.report(0.3), "a jump is taken back once"


def test_after_a_roll_back_jumps_are_half_as_long_and_recover() -> None:
    params, optimizer, _ = jumped()
    with pytest.warns(RuntimeWarning, match="rolled back"):
        while not optimizer.report(0.3):
            pass
    drift = [optimizer.state[p]["extra_drift"].clone() for p in params]
    for _ in range(5):
        assert not optimizer.report(0.3)
        step(params, optimizer)
    ratio = optimizer.state[params[0]]["extra_ratio"]
    assert ratio == pytest.approx(0.5 * 20 / 5 * 2 / 3)
    assert not torch.equal(drift[0], optimizer.state[params[0]]["extra_drift"])
    for _ in range(50):
        assert not optimizer.report(0.3)
        step(params, optimizer)
    assert optimizer.state[params[0]]["extra_ratio"] == pytest.approx(20 / 5 * 12 / 13)


def test_zeros_of_an_older_cycle_are_nothing_to_compare_with() -> None:
    """A policy that is never right reports 0: as much of a report as any other number."""
    params = [Parameter(torch.zeros(4))]
    optimizer = ExtraAdam(params, **KNOBS)
    for i in range(20):
        if 5 <= i < 10:
            assert not optimizer.report(0.0)
        step(params, optimizer)
    assert optimizer.last_jump.jumped == 1
    assert not any(optimizer.report(-1.0 - 0.01 * i) for i in range(5)), "nothing was reported in the cycle before"


def test_a_metric_that_is_only_noisy_takes_hardly_any_jump_back() -> None:
    params = [Parameter(torch.zeros(3))]
    optimizer = ExtraAdam(params, **KNOBS)
    noise = random.Random(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taken = 0
        for _ in range(5 * 400):
            taken += optimizer.report(noise.gauss(0.5, 0.1))
            step(params, optimizer)
    assert taken <= 14, "of 400 jumps that made nothing worse, where 7 are expected"


def test_a_better_metric_takes_nothing_back() -> None:
    params, optimizer, _ = jumped()
    for _ in range(4):
        step(params, optimizer)
        assert not optimizer.report(0.9)


def test_what_was_reported_goes_through_a_checkpoint() -> None:
    params, optimizer, _ = jumped()
    optimizer.report(0.3)
    optimizer.report(0.31)
    resumed = [Parameter(p.detach().clone()) for p in params]
    again = ExtraAdam(resumed, **KNOBS)
    again.load_state_dict(reload(optimizer.state_dict()))
    with pytest.warns(RuntimeWarning, match="rolled back"):
        assert optimizer.report(0.3) and again.report(0.3)
    assert_same([p.detach() for p in params], [p.detach() for p in resumed])
    assert_same(optimizer.state_dict(), again.state_dict())


def test_an_older_jump_of_a_group_with_a_longer_cycle_is_taken_back_too() -> None:
    fast, slow = Parameter(torch.zeros(4)), Parameter(torch.zeros(4))
    groups = [{"params": [fast], "extra_every": 3}, {"params": [slow], "extra_every": 6, "extra_start": 0}]
    optimizer = ExtraAdam(groups, **{**KNOBS, "extra_beta": 0.5})
    for i in range(15):  # both end at step 12, the fast one alone at 15
        optimizer.report(0.6 + 0.01 * (-1) ** i)
        step([fast, slow], optimizer)
    landed = [p.detach().clone() for p in (fast, slow)]
    optimizer.report(0.31), optimizer.report(0.3)
    with pytest.warns(RuntimeWarning, match="rolled back"):
        assert optimizer.report(0.3)
    assert not torch.equal(fast, landed[0]) and torch.equal(slow, landed[1])


def test_a_group_added_after_a_report_joins_in() -> None:
    params, optimizer, _ = jumped()
    late = Parameter(torch.zeros(3))
    optimizer.add_param_group({"params": [late]})
    for _ in range(10):
        step([*params, late], optimizer)
        optimizer.report(0.6)
    assert [group["extra_scale"] for group in optimizer.param_groups] == [1.0, 1.0]
    assert optimizer.state[late]["extra_ratio"] > 0


def test_a_metric_that_is_not_finite_is_left_out() -> None:
    _, optimizer, _ = jumped()
    for value in (float("nan"), float("-inf"), float("nan")):
        assert not optimizer.report(value)


def test_before_the_first_step_and_the_first_jump_there_is_nothing_to_take_back() -> None:
    params = [Parameter(torch.zeros(3))]
    optimizer = ExtraAdam(params, **KNOBS)
    assert not optimizer.report(1.0)
    for i in range(9):
        step(params, optimizer)
        assert not optimizer.report(1.0 - i)


def test_the_papers_rule_keeps_nothing_to_go_back_by() -> None:
    with pytest.raises(RuntimeError, match="extra_beta=0, extra_gate=None"):
        ExtraAdam([Parameter(torch.zeros(3))], **PAPER).report(0.5)


def test_a_drift_that_is_not_finite_is_not_taken_back_with() -> None:
    params, optimizer, _ = jumped()
    with torch.no_grad():
        optimizer.state[params[0]]["extra_drift"][0] = float("nan")
    stays = params[0].detach().clone()
    with pytest.warns(RuntimeWarning, match="rolled back"):
        while not optimizer.report(0.3):
            pass
    assert torch.equal(params[0], stays)


def test_weights_put_in_since_the_jump_have_none_to_take_back() -> None:
    params, optimizer, _ = jumped()
    with torch.no_grad():
        for p in params:
            p.zero_()
    optimizer.reset_anchor()
    for _ in range(4):
        assert not optimizer.report(0.3)
    assert not any(p.any() for p in params)
