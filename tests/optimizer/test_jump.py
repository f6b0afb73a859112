"""jump(), reset_anchor(), last_jump, and when a cycle is due."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch

import extraopt.mixin
from extraopt import ExtraAdam, JumpReport
from extraopt.kernels import native
from extraopt.wrap import Extra

PAPER = {"extra_every": 5, "extra_steps": 20, "extra_beta": 0.0, "extra_gate": None}


def model(*shapes: tuple[int, ...], seed: int = 0, **hyperparameters):
    """Tensors and an optimizer of them, whose jumps are N steps long unless said."""
    g = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(s, generator=g)) for s in shapes or [(4, 3), (5,)]]
    return params, ExtraAdam(params, lr=0.01, **{"extra_kl": None, **hyperparameters})


def run(params, optimizer, steps: int) -> list[int]:
    """Applied steps at which a cycle ended."""
    ends, last = [], optimizer.last_jump
    for _ in range(steps):
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        if optimizer.last_jump is not last:
            last = optimizer.last_jump
            ends.append(last.step)
    return ends


def test_cycles_end_every_k_applied_steps():
    params, optimizer = model(**PAPER)
    assert optimizer.last_jump is None
    assert run(params, optimizer, 17) == [5, 10, 15]


@pytest.mark.parametrize("k", [1, 3])
def test_nothing_jumps_in_the_first_cycle_with_a_gate(k):
    params, optimizer = model(extra_every=k, extra_steps=6)
    run(params, optimizer, k)
    assert optimizer.last_jump.gate == optimizer.last_jump.length == 0 and optimizer.last_jump.jumped == 0
    run(params, optimizer, k)
    assert optimizer.last_jump.gate == 1 and optimizer.last_jump.jumped == 2 and optimizer.last_jump.length == 6


def test_last_jump_tells_what_was_done_and_cannot_be_written():
    params, optimizer = model(**PAPER)
    run(params, optimizer, 4)
    anchor = [optimizer.state[p]["extra_anchor"].clone() for p in params]
    run(params, optimizer, 1)
    report = optimizer.last_jump
    moved = torch.cat([(p.detach() - a).flatten() for p, a in zip(params, anchor)]).double()  # (1 + N/k) * D
    assert isinstance(report, JumpReport)
    assert (report.step, report.length, report.gate, report.jumped, report.refused) == (5, 20.0, 1.0, 2, 0)
    assert math.isnan(report.kl) and math.isnan(report.fall)  # nothing was measured
    assert report.drift_norm == pytest.approx(float(moved.norm()) / 5, rel=1e-4)
    before = torch.cat([(a + (p.detach() - a) / 5).flatten() for p, a in zip(params, anchor)]).double()
    assert report.weight_norm == pytest.approx(float(before.norm()), rel=1e-4)
    with pytest.raises(AttributeError):
        report.gate = 0.5
    with pytest.raises(AttributeError):
        optimizer.last_jump = None


def test_coherence_closes_the_gate_when_the_path_turns_back():
    params, optimizer = model(extra_every=3, extra_steps=9, extra_gate=0.4)
    run(params, optimizer, 6)
    for p in params:  # from now on the other way, faster than the moments remember
        optimizer.state[p]["exp_avg"].neg_()
    with torch.no_grad():
        for p in params:
            p.grad = -torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert optimizer.last_jump.coherence < 0 and optimizer.last_jump.gate == 0 and optimizer.last_jump.jumped == 0


def test_jump_ends_the_cycle_early_and_the_next_one_is_whole():
    params, optimizer = model(**PAPER)
    run(params, optimizer, 3)
    end = [p.detach().clone() for p in params]
    anchor = [optimizer.state[p]["extra_anchor"].clone() for p in params]
    report = optimizer.jump()
    assert report is optimizer.last_jump and report.step == 3 and report.jumped == 2
    for p, e, a in zip(params, end, anchor):
        torch.testing.assert_close(p, e + 4 * (e - a))
        assert torch.equal(optimizer.state[p]["extra_anchor"], p)
    assert run(params, optimizer, 11) == [8, 13]


def test_jump_twice_or_at_the_end_of_a_cycle_does_nothing():
    params, optimizer = model(**{**PAPER, "extra_beta": 0.5})
    assert optimizer.jump() is None  # before the first step
    run(params, optimizer, 5)
    weights = [p.detach().clone() for p in params]
    drifts = [optimizer.state[p]["extra_estimate"].clone() for p in params]
    assert optimizer.jump() is None
    assert all(torch.equal(p, w) for p, w in zip(params, weights))
    assert all(torch.equal(optimizer.state[p]["extra_estimate"], v) for p, v in zip(params, drifts))
    assert run(params, optimizer, 5) == [10]


def test_an_edit_from_outside_is_not_extrapolated_after_reset_anchor():
    params, optimizer = model(**PAPER)
    run(params, optimizer, 7)
    with torch.no_grad():
        for p in params:
            p.zero_()
    optimizer.reset_anchor()
    assert run(params, optimizer, 5) == [12]
    assert all(
        float(p.detach().abs().max()) < 0.3 for p in params
    )  # 5 + 20 steps of lr 0.01, not -4 times the old weights


def test_no_jump_before_extra_start_but_the_estimate_learns():
    params, optimizer = model(extra_every=3, extra_steps=9, extra_start=8)
    adamw_params, _ = model()
    adamw = torch.optim.AdamW(adamw_params, lr=0.01)
    for _ in range(8):
        run(params, optimizer, 1)
        for p in adamw_params:
            p.grad = torch.ones_like(p)
        adamw.step()
    assert all(torch.equal(p, q) for p, q in zip(params, adamw_params))
    assert optimizer.last_jump.jumped == 0 and optimizer.last_jump.drift_norm > 0
    run(params, optimizer, 1)
    assert optimizer.last_jump.gate == 1 and optimizer.last_jump.jumped >= 2


def test_a_tensor_that_stood_still_or_is_new_does_not_ride_on_the_coherence_of_the_others():
    (moving, still, late), optimizer = model((4,), (3,), (2,), extra_every=3, extra_steps=9, extra_beta=0.0)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    run([moving, still], optimizer, 6)
    with torch.no_grad():
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[still][key].zero_()
    optimizer.state[late] = {}
    for t in range(3):
        moving.grad, still.grad, late.grad = torch.ones(4), torch.zeros(3), torch.ones(2)
        if t == 0:
            w = still.detach().clone()
        optimizer.step()
    assert 0 < optimizer.last_jump.gate < 1 and optimizer.last_jump.jumped == 1
    assert torch.equal(still, w)
    assert float(optimizer.state[late]["step"]) == 3 and optimizer.last_jump.step == 9


def lengths(optimizer, params, cycles: int) -> list[float]:
    """How far the first cycles jumped."""
    found = []
    for _ in range(cycles):
        run(params, optimizer, optimizer.param_groups[0]["extra_every"])
        found.append(optimizer.last_jump.length)
    return found


@pytest.mark.parametrize("steps, length", [(200, 20), (12, 12), (0, 0)])
def test_without_a_model_to_watch_jumps_are_short_and_said_so_once(steps, length):
    params, optimizer = model(extra_every=3, extra_steps=steps, extra_kl=0.02)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if steps:
            assert lengths(optimizer, params, 5) == [0, *[length] * 4]
            report = optimizer.last_jump
            assert math.isnan(report.kl) and math.isnan(report.fall) and report.gate == 1 and report.jumped == 2
            assert optimizer.param_groups[0]["extra_length"] == 20  # nothing was found out
        else:
            run(params, optimizer, 15)
    said = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
    assert len(said) == (steps > 0)
    assert all(f"jumps are at most {length} steps long" in text and "extra_watch=False" in text for text in said)


@pytest.mark.parametrize("kind", ["ExtraAdam", "Extra", "a copy", "loaded", "unwatched"])
def test_with_extra_watch_false_jumps_are_short_and_nothing_is_said(kind):
    options = {"extra_every": 3, "extra_steps": 60, "extra_kl": 0.02, "extra_watch": kind == "unwatched"}
    params, optimizer = model(**options)
    if kind == "Extra":
        optimizer = Extra(torch.optim.AdamW(params, lr=0.01), **options)
    elif kind == "unwatched":
        optimizer.unwatch()
    elif kind == "loaded":  # what was saved does not say what there is to watch here
        optimizer.load_state_dict(model(**{**options, "extra_watch": True})[1].state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if kind == "a copy":
            run(params, optimizer, 1)
            params, optimizer = copy.deepcopy((params, optimizer))
            run(params, optimizer, 2)
            assert lengths(optimizer, params, 2) == [20, 20]
        else:
            assert lengths(optimizer, params, 3) == [0, 20, 20]
    assert optimizer._trust.watch.model is None and not optimizer._trust.watch.searching


@pytest.mark.parametrize("kl", [0.02, None])
def test_without_a_trust_region_a_jump_is_all_of_the_horizon(kl):
    params, optimizer = model(extra_every=3, extra_steps=60, extra_kl=kl, extra_watch=False)
    assert lengths(optimizer, params, 4) == ([0, 60, 60, 60] if kl is None else [0, 20, 20, 20])


def test_a_group_with_a_trust_region_does_not_limit_one_without():
    (a, b), _ = model()
    groups = [{"params": [a], "extra_kl": None}, {"params": [b]}]
    optimizer = ExtraAdam(groups, lr=0.01, weight_decay=0, extra_every=3, extra_steps=60, extra_watch=False)
    run([a, b], optimizer, 3)
    before = [p.detach().clone() for p in (a, b)]
    run([a, b], optimizer, 3)
    moved = [float((p.detach() - q).abs().mean()) for p, q in zip((a, b), before)]
    assert moved == pytest.approx([0.63, 0.23], rel=1e-3) and optimizer.last_jump.length == 60


def test_a_horizon_set_to_zero_and_back_jumps_one_cycle_far():
    params, optimizer = model(**PAPER)
    run(params, optimizer, 5)
    optimizer.param_groups[0]["extra_steps"] = 0
    run(params, optimizer, 20)
    optimizer.param_groups[0]["extra_steps"] = 20
    before = [p.detach().clone() for p in params]
    run(params, optimizer, 5)
    assert optimizer.last_jump.jumped >= 2
    assert all(float((p.detach() - b).abs().max()) < 26 * 0.011 for p, b in zip(params, before))


@pytest.mark.parametrize("dtype, size", [(torch.float32, 4), (torch.bfloat16, 2)])
def test_state_costs_two_copies_one_without_an_estimate_none_without_a_horizon(dtype, size):
    for hyperparameters, copies in (({}, 2), ({"extra_beta": 0.0}, 2), (PAPER, 1), ({"extra_steps": 0}, 0)):
        p = torch.nn.Parameter(torch.ones(64, 8, dtype=dtype))
        optimizer = ExtraAdam([p], lr=0.01, **{"extra_kl": None, **hyperparameters})
        run([p], optimizer, 11)
        state = [v for v in optimizer.state[p].values() if torch.is_tensor(v) and v.dim()]
        # AdamW's two moments, and ours; the 0-dim step counter is left out
        assert sum(v.untyped_storage().nbytes() for v in state) == (2 + copies) * size * p.numel()


def test_a_learning_rate_on_a_device_is_not_read():
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    optimizer = ExtraAdam([p])
    optimizer.param_groups[0]["lr"] = torch.tensor(0.01, device="meta")  # a read of it raises, and so is seen
    optimizer._before_step()
    assert optimizer.state[p]["extra_origin"] == 0


@pytest.mark.parametrize("hyperparameters", [{}, PAPER, {"extra_offload": True}], ids=["default", "paper", "offload"])
@pytest.mark.parametrize("kernels", ["C", "torch"])
def test_the_end_of_a_cycle_makes_its_tensors_on_the_default_device(monkeypatch, kernels, hyperparameters):
    """torch.set_default_device("cuda") stopped it; here the meta device stands for that, around all but AdamW."""
    if kernels == "torch":
        monkeypatch.setattr(native, "supports", lambda *_: False)
    (params, optimizer), (others, control) = (model((4, 3), (5,), (0,), **hyperparameters) for _ in range(2))
    end_cycle = extraopt.mixin.end_cycle

    def elsewhere(*arguments):
        with torch.device("meta"):
            return end_cycle(*arguments)

    for i in range(20):
        for p, q in zip(params, others):
            p.grad = q.grad = torch.full_like(p, 1 + i % 3)
        control.step()
        with monkeypatch.context() as patch:
            patch.setattr(extraopt.mixin, "end_cycle", elsewhere)
            optimizer.step()
    assert optimizer.last_jump == control.last_jump and optimizer.last_jump.jumped >= 2
    assert all(torch.equal(p, q) for p, q in zip(params, others))


def test_a_differentiable_step_passes_gradients_through_the_jump():
    start = torch.ones(3, dtype=torch.float64, requires_grad=True)
    p = start * 1.0
    p.retain_grad()
    optimizer = ExtraAdam(
        [p], lr=0.1, differentiable=True, extra_every=1, extra_steps=3, extra_gate=None, extra_beta=0.0, extra_kl=None
    )
    p.grad = torch.ones(3, dtype=torch.float64)
    optimizer.step()
    assert optimizer.last_jump.jumped == 1
    p.sum().backward()
    assert torch.allclose(
        start.grad, torch.full((3,), 1 - 0.1 * 0.01, dtype=torch.float64)
    )  # only weight decay scales it


def test_the_anchor_after_a_differentiable_jump_is_where_the_weights_landed():
    """To the last bit: a difference would be a part of the next drift."""
    g = torch.Generator().manual_seed(0)
    p = torch.randn(1000, generator=g, requires_grad=True) * 1.0
    optimizer = ExtraAdam(
        [p], lr=0.1, differentiable=True, extra_every=1, extra_steps=3, extra_gate=None, extra_kl=None
    )
    p.grad = torch.randn(1000, generator=g)
    optimizer.step()
    assert optimizer.last_jump.jumped == 1
    assert torch.equal(optimizer.state[p]["extra_anchor"], p.detach())


def test_a_horizon_of_zero_in_mid_run_still_retreats() -> None:
    g = torch.Generator().manual_seed(0)
    params, optimizer = model(extra_every=3, extra_steps=9)
    late = torch.nn.Parameter(torch.ones(3))  # of the same group, without an anchor when the horizon ends
    optimizer.param_groups[0]["params"].append(late)
    for i in range(20):
        if i == 7:
            optimizer.param_groups[0]["extra_steps"] = 0
            twins = [torch.nn.Parameter(p.detach().clone()) for p in (*params, late)]
            adamw = torch.optim.AdamW(twins, lr=0.01)
            adamw.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for p in params if i < 7 else (*params, late):
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        if i >= 7:
            for q, p in zip(twins, (*params, late)):
                q.grad = p.grad.clone()
            adamw.step()
            assert all(torch.equal(p, q) for p, q in zip((*params, late), twins)), i
