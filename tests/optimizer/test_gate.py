"""Gates: how far each tensor dares, and what noise looks like to them."""

from __future__ import annotations

import pytest
import torch

from extraopt import ExtraAdam
from extraopt.gate import coherence, momentum_coherence, openness, retreats


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
        estimate = beta * estimate + (1 - beta) * drift


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
    optimizer = ExtraAdam([straight, turning], lr=0.01, betas=(0.0, 0.99), weight_decay=0, extra_every=2, extra_steps=8)
    plain = torch.nn.Parameter(torch.zeros(5))
    adamw = torch.optim.AdamW([plain], lr=0.01, betas=(0.0, 0.99), weight_decay=0)

    def gradient(i: int, step: int, p: torch.Tensor) -> torch.Tensor:
        return torch.full_like(p, -1.0 if i == 0 or step < 2 else 1.0)

    _run(optimizer, gradient, 4)
    for step in range(4):
        plain.grad = gradient(1, step, plain)
        adamw.step()
    assert optimizer.last_jump.jumped == 1
    # b = 1 - 2/8, so the estimate of two drifts of 0.02 is (1 - b^2) of one, and half of 8/2 of it is jumped
    assert straight.tolist() == pytest.approx([0.04 + 4 / 2 * (1 - 0.75**2) * 0.02] * 5, rel=1e-4)
    assert plain.tolist() == pytest.approx([0.0] * 5, abs=1e-6)  # there and back
    assert turning.tolist() == pytest.approx([0.01] * 5, rel=1e-4)  # there and half of the way back


def test_a_retreat_fades_where_the_drift_is_small_beside_its_weights() -> None:
    sums = torch.tensor([[0, 4.0, 0, 4], [0, 4, 0, 4e4], [0, 4, 0, 4e6], [0, 4, 0, 4e12], [0, 4, 0, 0], [0, 0, 0, 0]])
    shut = torch.zeros(6, dtype=torch.float64)
    assert retreats(sums.double(), shut).tolist() == [0.5, 0.5, 26 / 512, 0, 0.5, 0]
    assert retreats(sums.double(), shut + 0.75).tolist() == [64 / 512, 64 / 512, 6 / 512, 0, 64 / 512, 0]
    assert retreats(sums.double(), shut + 1).tolist() == [0] * 6


def test_small_steps_of_a_large_model_are_halved_where_gates_are_shut() -> None:
    runs = []
    for kind in (torch.optim.AdamW, ExtraAdam):
        p = torch.nn.Parameter(torch.ones(1000))
        _run(
            kind([p], lr=1e-5), lambda i, step, p: torch.randn(1000, generator=torch.Generator().manual_seed(step)), 100
        )
        runs.append(p.detach().double() - 1)
    adamw, ours = runs
    assert float((ours - adamw).norm() / adamw.norm()) < 0.05


def test_the_horizon_grows_with_the_drifts_seen() -> None:
    p = torch.nn.Parameter(torch.zeros(1))
    optimizer = ExtraAdam([p], lr=0.01, betas=(0.0, 0.99), weight_decay=0, extra_every=2, extra_steps=8)
    jumps = []
    for _ in range(8):
        start = float(p.detach())
        _run(optimizer, lambda i, step, p: -torch.ones_like(p), 2)
        jumps.append(float(p.detach()) - start - 0.02)
    shares = [j / (j + 1) for j in range(8)]
    assert jumps == pytest.approx(
        [4 * share * (1 - 0.75 ** (j + 1)) * 0.02 for j, share in enumerate(shares)], rel=1e-4, abs=1e-8
    )


def test_an_estimate_that_was_lost_is_trusted_as_the_old_one_was() -> None:
    p, q = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = ExtraAdam([p, q], lr=0.01, betas=(0.0, 0.99), weight_decay=0, extra_every=2, extra_steps=8)
    _run(optimizer, lambda i, step, p: -torch.ones_like(p), 20)
    optimizer.state[p]["extra_drift"].fill_(float("nan"))
    with pytest.warns(RuntimeWarning, match="1 of 2 tensors did not jump"):
        _run(optimizer, lambda i, step, p: -torch.ones_like(p), 2)
    starts = []
    for _ in range(3):
        starts += [float(p.detach())]
        _run(optimizer, lambda i, step, p: -torch.ones_like(p), 2)
    moved = [b - a for a, b in zip(starts, [*starts[1:], float(p.detach())])]
    shares = [0, 1 / 2, 2 / 3]  # as from the start
    expected = [0.02 + 4 * share * (1 - 0.75 ** (j + 1)) * 0.02 for j, share in enumerate(shares)]
    assert moved == pytest.approx(expected, rel=1e-4)


def test_on_pure_noise_it_wanders_less_far_than_adamw() -> None:
    ours, theirs = (torch.nn.Parameter(torch.zeros(20_000)) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.0}
    optimizer = ExtraAdam([ours], **options)
    noise = [torch.randn(20_000, generator=torch.Generator().manual_seed(step)) for step in range(400)]
    _run(optimizer, lambda i, step, p: noise[step], 400)
    _run(torch.optim.AdamW([theirs], **options), lambda i, step, p: noise[step], 400)
    assert optimizer.last_jump.gate < 0.1
    assert float(ours.detach().norm()) < 0.8 * float(theirs.detach().norm())


def test_on_a_straight_path_it_gets_further_than_adamw_by_the_horizon() -> None:
    ours, theirs = (torch.nn.Parameter(torch.zeros(100)) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.0}
    _run(ExtraAdam([ours], **options), lambda i, step, p: -torch.ones_like(p), 1000)
    _run(torch.optim.AdamW([theirs], **options), lambda i, step, p: -torch.ones_like(p), 1000)
    assert 13 < float((ours / theirs).mean().detach()) < 21  # 1 + N/k once the average has settled
