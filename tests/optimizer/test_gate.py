"""Gates: how far each tensor dares, and what noise looks like to them."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extraopt import ExtraAdam
from extraopt.gate import (
    averaged_noise,
    averaged_norm,
    coherence,
    momentum_coherence,
    noise_floor,
    openness,
    plain_noise,
    plain_weights,
    retreats,
)
from extraopt.kernels import reference


@pytest.mark.parametrize("momentum", [0.9, 0.5])
@pytest.mark.parametrize("every, beta", [(1, 0.5), (3, 0.5), (10, 0.0), (10, 0.95), (5, 0.9), (20, 0.9)])
def test_noise_is_as_coherent_as_momentum_makes_it(every: int, beta: float, momentum: float) -> None:
    generator = torch.Generator().manual_seed(0)
    cycles, size = int(4 / (1 - beta)) + 30, 4000
    step, estimate = torch.zeros(2, size, dtype=torch.float64)
    seen = []
    for cycle in range(cycles):
        drift = torch.zeros(size, dtype=torch.float64)
        for _ in range(every):
            step = momentum * step + torch.randn(size, generator=generator, dtype=torch.float64)
            drift += step
        if cycle >= cycles - 25:
            seen.append(float(torch.nn.functional.cosine_similarity(drift, estimate, dim=0)))
        estimate = beta * estimate + (1 - beta) * drift
    assert momentum_coherence(every, beta, momentum) == pytest.approx(sum(seen) / len(seen), abs=0.015)


@pytest.mark.parametrize("beta", [0.95, 0.5])
def test_an_estimate_of_few_drifts_agrees_more_with_noise(beta: float) -> None:
    generator = torch.Generator().manual_seed(0)
    step = torch.zeros(20_000, dtype=torch.float64)
    for _ in range(50):
        step = 0.9 * step + torch.randn(20_000, generator=generator, dtype=torch.float64)
    estimate = torch.zeros_like(step)
    for seen in range(8):
        drift = torch.zeros_like(step)
        for _ in range(10):
            step = 0.9 * step + torch.randn(20_000, generator=generator, dtype=torch.float64)
            drift += step
        if seen:
            cosine = float(torch.nn.functional.cosine_similarity(drift, estimate, dim=0))
            assert momentum_coherence(10, beta, 0.9, seen) == pytest.approx(cosine, abs=0.03)
        share = max(1 / (seen + 1), 1 - beta)
        estimate = estimate + share * (drift - estimate)


def fold(taken: list[float], every: int, momentum: float) -> tuple[torch.Tensor, torch.Tensor]:
    cov = var = torch.zeros(1, dtype=torch.float64)
    for w in taken:
        cov, var = averaged_noise(cov, var, torch.tensor([w], dtype=torch.float64), every, momentum)
    return cov, var


@given(
    taken=st.lists(st.floats(0.01, 1), max_size=12),
    every=st.integers(1, 12),
    momentum=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_the_folded_noise_floor_is_that_of_the_whole_covariance_matrix(taken, every, momentum):
    """Of an estimate that took in its drifts by any weights: the reference holds all their covariances at once."""
    taken = [1.0, *taken]  # the first drift is the estimate
    floor = float(noise_floor(*fold(taken, every, momentum)))
    assert floor == pytest.approx(reference._noise_floor(taken, every, momentum), rel=1e-9, abs=1e-12)
    assert 0 <= floor < 1


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("every", [1, 3, 10])
def test_an_estimate_without_drifts_has_no_noise_floor(every: int, momentum: float) -> None:
    assert float(noise_floor(*fold([], every, momentum))) == reference._noise_floor([], every, momentum) == 0


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.9999])
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99, 1 - 1e-9])
@pytest.mark.parametrize("seen", [0, 1, 2, 3, 10, 40, 1000])
def test_plain_noise_is_the_fold_of_a_mean_and_then_an_exponential_average(
    beta: float, seen: int, momentum: float
) -> None:
    taken = plain_weights(torch.arange(seen), beta).tolist()
    assert taken == [max(1 / (j + 1), 1 - beta) for j in range(seen)]
    for got, want in zip(plain_noise(7, beta, momentum, seen), fold(taken, 7, momentum)):
        assert got.dtype == torch.float64 and float(got) == pytest.approx(float(want), rel=1e-12, abs=0)
    if 0 < seen <= 40:
        floor = reference._noise_floor(taken, 7, momentum)
        assert momentum_coherence(7, beta, momentum, seen) == pytest.approx(floor, rel=1e-6)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("beta", [0.9, 1 - 1e-9])
def test_plain_noise_of_any_number_of_drifts_takes_no_time(beta: float) -> None:
    """A loop over the drifts would take years."""
    cov, _ = plain_noise(10, beta, 0.9, 2**53)
    neighbours = float(plain_noise(10, 0.0, 0.9, 1)[0])
    assert float(cov) == pytest.approx((1 - beta) * neighbours / (1 - beta * 0.9**10), rel=1e-9)  # it changes no more
    assert momentum_coherence(10, math.nextafter(1.0, 0.0)) == pytest.approx(0, abs=1e-4)


def test_the_length_of_the_next_estimate_follows_from_the_sums() -> None:
    g = torch.Generator().manual_seed(0)
    d, v = torch.randn(2, 5, 30, generator=g, dtype=torch.float64)
    w = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    sums = torch.stack([(d * v).sum(1), (d * d).sum(1), (v * v).sum(1), torch.ones(5)], 1)
    torch.testing.assert_close(averaged_norm(sums, w), (v + w[:, None] * (d - v)).norm(dim=1))


@pytest.mark.parametrize("beta", [0.9, 0.5])
def test_gates_stay_shut_on_the_noise_of_adamw(beta: float) -> None:
    """White gradients: there is nothing to follow, whatever the weights by which estimates are averaged."""
    shapes = (1000,), (40, 50), (3000,)
    params = [torch.nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(9))) for s in shapes]
    optimizer = ExtraAdam(params, lr=1e-3, extra_every=10, extra_steps=3, extra_beta=beta, extra_kl=None)
    g = torch.Generator().manual_seed(0)
    gates = []
    for step in range(400):
        for p in params:
            p.grad = torch.randn(p.shape, generator=g)
        optimizer.step()
        if step % 10 == 9:
            gates.append(optimizer.last_jump.gate)
    assert len(gates) == 40 and sum(gates) / 40 < 0.05
    assert max(gates[1:]) < 0.2


def test_a_coherent_drift_is_taken_in_by_the_square_of_its_gate() -> None:
    """w = max(1 / (j + 1), 1 - b, g^2): an open gate makes the newest drift the estimate."""
    p = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = ExtraAdam([p], lr=0.01, betas=(0.0, 0.99), weight_decay=0, extra_every=2, extra_steps=3, extra_kl=None)
    state = optimizer.state[p]
    drifts, gates = [], []
    for cycle in range(6):
        optimizer.param_groups[0]["lr"] = 0.01 * (cycle + 1)  # straight, and longer each time
        start = p.detach().clone()
        for i in range(2):
            # the fourth drift is partly along the others, and the last one turns back
            grad = {3: [-1.0, -1, -1, 1], 5: [1.0] * 4}.get(cycle, [-1.0] * 4)
            p.grad = torch.tensor(grad, dtype=torch.float64)
            if i == 1:
                state = optimizer.state[p]
                before = state["extra_estimate"].clone()
            optimizer.step()
        gates.append(optimizer.last_jump.gate)
        drifts.append(0.02 * (cycle + 1) * -torch.tensor(grad, dtype=torch.float64))
        cosine = float(torch.nn.functional.cosine_similarity(drifts[-1], before, dim=0))
        g = round(256 * min(max(cosine / 0.5, 0), 1)) / 256  # without momentum the floor is 0
        w = max(1 / (cycle + 1), 0.1, g * g)
        torch.testing.assert_close(state["extra_estimate"], before + w * (drifts[-1] - before), rtol=1e-5, atol=1e-9)
        back = (1 - g) / 2 * (cycle > 0)
        landed = start + drifts[-1] * (1 - back) + g * 3 / 2 * state["extra_estimate"]
        torch.testing.assert_close(p.detach(), landed, rtol=1e-5, atol=1e-9)
    assert gates[0] == 0 and gates[1] == gates[2] == 1 and gates[5] == 0


def test_without_a_gate_an_estimate_is_a_mean_and_then_an_exponential_average() -> None:
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    options = {"extra_every": 2, "extra_steps": 3, "extra_gate": None, "extra_beta": 0.75, "extra_kl": None}
    optimizer = ExtraAdam([p], lr=0.01, betas=(0.0, 0.99), weight_decay=0, **options)
    estimate, drifts = 0.0, [0.02 * (-1) ** (i // 3) for i in range(9)]
    for j, d in enumerate(drifts):
        start = float(p.detach())
        for _ in range(2):
            p.grad = torch.full_like(p, -1.0 if d > 0 else 1.0)
            optimizer.step()
        estimate += max(1 / (j + 1), 0.25) * (d - estimate)
        assert float(optimizer.state[p]["extra_estimate"]) == pytest.approx(estimate, rel=1e-5)
        assert float(p.detach()) == pytest.approx(start + d + 3 / 2 * estimate, rel=1e-5, abs=1e-9)


def test_without_momentum_noise_is_not_coherent_at_all() -> None:
    assert momentum_coherence(10, 0.9, 0.0) == 0


def test_gates_open_from_what_noise_shows_and_are_open_a_part_of_the_way_to_full_coherence() -> None:
    cosines = torch.tensor([-1.0, 0.0, 0.2, 0.4, 0.6, 1.0], dtype=torch.float64)
    assert openness(cosines, 0.5, torch.tensor(0.2)).tolist() == pytest.approx([0, 0, 0, 0.5, 1, 1])
    assert openness(cosines, 1.0, torch.tensor(0.0)).tolist() == pytest.approx([0, 0, 0.2, 0.4, 0.6, 1], abs=1 / 512)
    assert openness(cosines, None, torch.tensor(0.2)).tolist() == [1] * 6
    assert all((256 * g).is_integer() for g in openness(cosines, 0.37, torch.tensor(0.11)).tolist())


def test_coherence_of_what_stands_still_is_zero() -> None:
    sums = torch.tensor([[2.0, 4, 4, 1], [0, 0, 4, 1], [0, 4, 0, 1], [-9, 4, 4, 1], [0, 0, 0, 0]], dtype=torch.float64)
    assert coherence(sums).tolist() == [0.5, 0, 0, -1, 0]


def _run(optimizer: torch.optim.Optimizer, gradient, steps: int) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for i, p in enumerate(params):
            p.grad = gradient(i, step, p)
        optimizer.step()


def test_a_straight_tensor_jumps_while_one_that_turns_back_retreats() -> None:
    straight, turning = (torch.nn.Parameter(torch.zeros(5)) for _ in range(2))
    options = {"extra_every": 2, "extra_steps": 8, "extra_kl": None}
    optimizer = ExtraAdam([straight, turning], lr=0.01, betas=(0.0, 0.99), weight_decay=0, **options)
    plain = torch.nn.Parameter(torch.zeros(5))
    adamw = torch.optim.AdamW([plain], lr=0.01, betas=(0.0, 0.99), weight_decay=0)

    def gradient(i: int, step: int, p: torch.Tensor) -> torch.Tensor:
        return torch.full_like(p, -1.0 if i == 0 or step < 2 else 1.0)

    _run(optimizer, gradient, 4)
    for step in range(4):
        plain.grad = gradient(1, step, plain)
        adamw.step()
    assert optimizer.last_jump.jumped == 1
    # the estimate of two drifts of 0.02 is one of them, and 8/2 of it is jumped
    assert straight.tolist() == pytest.approx([0.04 + 8 / 2 * 0.02] * 5, rel=1e-4)
    assert plain.tolist() == pytest.approx([0.0] * 5, abs=1e-6)  # there and back
    assert turning.tolist() == pytest.approx([0.01] * 5, rel=1e-4)  # there and half of the way back


def test_a_retreat_fades_where_the_drift_is_small_beside_its_weights() -> None:
    sums = torch.tensor([[0, 4.0, 0, 4], [0, 4, 0, 4e4], [0, 4, 0, 4e6], [0, 4, 0, 4e12], [0, 4, 0, 0], [0, 0, 0, 0]])
    shut = torch.zeros(6, dtype=torch.float64)
    assert retreats(sums.double(), shut).tolist() == [0.5, 0.5, 26 / 512, 0, 0.5, 0]
    assert retreats(sums.double(), shut + 0.75).tolist() == [64 / 512, 64 / 512, 6 / 512, 0, 64 / 512, 0]
    assert retreats(sums.double(), shut + 1).tolist() == [0] * 6


def test_small_steps_of_a_large_model_are_kept_where_gates_are_shut() -> None:
    runs = []
    for kind in (torch.optim.AdamW, functools.partial(ExtraAdam, extra_kl=None)):
        p = torch.nn.Parameter(torch.ones(1000))
        _run(
            kind([p], lr=1e-5), lambda i, step, p: torch.randn(1000, generator=torch.Generator().manual_seed(step)), 100
        )
        runs.append(p.detach().double() - 1)
    adamw, ours = runs
    assert float((ours - adamw).norm() / adamw.norm()) < 0.05


def test_a_straight_path_jumps_all_of_the_horizon_from_the_second_cycle_on() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    options = {"extra_every": 2, "extra_steps": 8, "extra_kl": None}
    optimizer = ExtraAdam([p], lr=0.01, betas=(0.0, 0.99), weight_decay=0, **options)
    jumps = []
    for _ in range(8):
        start = float(p.detach())
        _run(optimizer, lambda i, step, p: -torch.ones_like(p), 2)
        jumps.append(float(p.detach()) - start - 0.02)
    assert jumps == pytest.approx([0.0] + [4 * 0.02] * 7, rel=1e-4, abs=1e-8)


def test_an_estimate_that_was_lost_begins_as_a_new_one() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    options = {"extra_every": 2, "extra_steps": 8, "extra_kl": None}
    optimizer = ExtraAdam([p, q], lr=0.01, betas=(0.5, 0.99), weight_decay=0, **options)
    _run(optimizer, lambda i, step, p: -torch.ones_like(p), 20)
    state = optimizer.state[p]
    assert state["extra_noise_var"] > 0
    state["extra_estimate"].fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="1 of 2 tensors did not jump"):
        _run(optimizer, lambda i, step, p: -torch.ones_like(p), 2)
    assert (float(state["extra_estimate"]), state["extra_noise_cov"], state["extra_noise_var"]) == (0, 0, 0)
    assert state["extra_origin"] == 22 and optimizer.state[q]["extra_origin"] == 0
    moved = []
    for _ in range(3):
        start = float(p.detach())
        _run(optimizer, lambda i, step, p: -torch.ones_like(p), 2)
        moved += [float(p.detach()) - start]
        assert state["extra_noise_var"] > 0
    # as from the start: in its first cycle nothing jumps
    assert moved == pytest.approx([0.02, 0.02 + 4 * 0.02, 0.02 + 4 * 0.02], rel=1e-4)
    assert reference._noise_floor([1.0], 2, 0.5) > 0


def test_on_pure_noise_it_wanders_less_far_than_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.zeros(20_000)) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = ExtraAdam([ours], **options, extra_every=10, extra_kl=None)
    noise = [torch.randn(20_000, generator=torch.Generator().manual_seed(step)) for step in range(400)]
    _run(optimizer, lambda i, step, p: noise[step], 400)
    _run(torch.optim.AdamW([theirs], **options), lambda i, step, p: noise[step], 400)
    assert optimizer.last_jump.gate < 0.1
    assert float(ours.detach().norm()) < 0.8 * float(theirs.detach().norm())


def test_on_a_straight_path_it_gets_further_than_adamw_by_the_horizon() -> None:
    ours, theirs = (torch.nn.Parameter(torch.zeros(100)) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.0}
    _run(ExtraAdam([ours], **options, extra_every=10, extra_kl=None), lambda i, step, p: -torch.ones_like(p), 1000)
    _run(torch.optim.AdamW([theirs], **options), lambda i, step, p: -torch.ones_like(p), 1000)
    assert float((ours / theirs).mean().detach()) == pytest.approx(1 + 99 / 100 * 200 / 10, rel=1e-3)
