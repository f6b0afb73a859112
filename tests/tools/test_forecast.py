"""Forecasts from a Gram matrix, against the same forecasts made of the weights themselves in float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from extraopt.kernels.reference import end_cycle
from extraopt.tools.checkpoints.forecast import (
    METHODS,
    advise,
    chance,
    coherence,
    distances,
    forecast,
    reach,
    thin,
)

EVEN = [50.0 * i for i in range(14)]
UNEVEN = [0.0, 1.0, 4.0, 5.0, 11.0, 13.0, 20.0, 21.0]


def gram_of(weights: np.ndarray) -> torch.Tensor:
    drifts = torch.from_numpy(np.diff(weights, axis=0))
    return drifts @ drifts.T


def walk(steps: list[float], size: int, drift: float = 0.0, seed: int = 0) -> np.ndarray:
    """Unit noise in a step, and a drift of that size in each weight: [checkpoints, size]."""
    rng = np.random.default_rng(seed)
    t = np.array(steps)
    noise = rng.standard_normal((len(t) - 1, size)) * np.sqrt(np.diff(t))[:, None]
    start = rng.standard_normal((1, size))
    return start + np.concatenate([np.zeros((1, size)), noise.cumsum(0)]) + drift * t[:, None]


def by_hand(method: str, t: np.ndarray, w: np.ndarray, start: int, target: int) -> np.ndarray:
    """The forecast of w[target] from w[: start + 1], from the words of `METHODS`."""
    rates = np.diff(w[: start + 1], axis=0) / np.diff(t[: start + 1])[:, None]
    horizon = t[target] - t[start]
    if method == "ols":
        slope, intercept = np.polyfit(t[: start + 1], w[: start + 1], 1)
        return intercept + slope * t[target]
    if method == "secant":
        return w[start] + horizon * rates[-1]
    if method == "damped":
        again = rates[-2] @ rates[-1] / (rates[-2] @ rates[-2])
        return w[start] + min(1.0, max(0.0, again)) * horizon * rates[-1]
    every = int(t[start] - t[start - 1])
    zeros = [torch.zeros(len(w[0]), dtype=torch.float64)]
    estimate, taken, gate = zeros, list[float](), 0.0
    for rate in rates:  # cycles of ExtraAdam's own reference, from weights that are 0 but for the drift
        drift = [torch.from_numpy(rate)]
        options = {"every": every, "length": 0.0, "beta": 0.9, "gate": 0.5, "momentum": 0.9}
        _, estimate, (gate,), (share,) = end_cycle(drift, zeros, estimate, [taken], **options)
        taken = [*taken, share]
    return w[start] + gate * horizon * estimate[0].numpy()


@pytest.mark.parametrize("steps", [EVEN, UNEVEN, [0.0, 3.0, 4.0, 9.0]], ids=["even", "uneven", "four"])
@pytest.mark.parametrize("drift", [0.0, 0.4])
def test_every_skill_is_that_of_the_forecast_weights(steps: list[float], drift: float):
    weights, t = walk(steps, 30, drift), np.array(steps)
    rows = forecast(steps, gram_of(weights))
    assert [row.ahead for row in rows] == list(range(1, len(steps) - 2))
    for row, method in itertools.product(rows, METHODS):
        starts = range(2, len(steps) - row.ahead)
        miss = [((by_hand(method, t, weights, j, j + row.ahead) - weights[j + row.ahead]) ** 2).sum() for j in starts]
        still = [((weights[j] - weights[j + row.ahead]) ** 2).sum() for j in starts]
        assert row.starts == len(starts)
        assert row.steps == pytest.approx(np.mean([t[j + row.ahead] - t[j] for j in starts]))
        assert row.skill[method] == pytest.approx(1 - sum(miss) / sum(still), rel=1e-7, abs=1e-7)
        assert row.worst[method] == pytest.approx(min(1 - m / s for m, s in zip(miss, still)), rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("steps", [EVEN, UNEVEN], ids=["even", "uneven"])
def test_a_straight_line_is_forecast_perfectly_at_every_horizon(steps: list[float]):
    weights = np.outer(steps, np.linspace(-1, 2, 20)) + 3
    gram = gram_of(weights)
    assert coherence(gram) == pytest.approx([1.0] * (len(steps) - 2))
    for row in forecast(steps, gram):
        for method in METHODS:
            assert row.skill[method] == pytest.approx(1, abs=1e-9)
            assert row.worth[method] == pytest.approx(row.steps, rel=1e-6)
    advice = advise(steps, gram)
    assert advice and advice.skill == pytest.approx(1) and advice.worth == pytest.approx(advice.extra_steps, abs=1)


def test_the_straight_lines_advice_is_the_longest_jump_that_two_starts_confirm():
    advice = advise(EVEN, gram_of(np.outer(EVEN, [1.0, -2.0])))
    assert advice and (advice.extra_every, advice.extra_steps, advice.starts) == (50, 500, 2)


def test_a_walk_is_no_better_forecast_than_by_persistence_and_gets_no_advice():
    gram = gram_of(walk(EVEN, 20_000))
    rows = forecast(EVEN, gram)
    for row in rows:
        # the last drift is h parts of noise on top of the target's own h: skill -h in expectation
        assert row.skill["secant"] == pytest.approx(-row.ahead, rel=0.08)
        assert abs(row.skill["damped"]) < 0.02 and abs(row.skill["extra"]) < 0.02
        assert row.worth["secant"] == 0
    assert reach(rows, "extra") == [] and advise(EVEN, gram) is None
    assert max(map(abs, coherence(gram))) < 0.03


@pytest.mark.parametrize("rho", [0.2, 0.5, 0.8])
def test_drift_and_noise_break_even_where_the_theory_says(rho: float):
    # k s^2 / (1 + k s^2) = rho is the cosine of consecutive drifts; a full jump beats persistence iff rho > 1/2
    drift = math.sqrt(rho / (1 - rho) / 50)
    gram = gram_of(walk(EVEN, 20_000, drift))
    assert np.mean(coherence(gram)) == pytest.approx(rho, abs=0.02)
    first = forecast(EVEN, gram)[0]
    # errors: persistence rho + (1 - rho), the secant 2 (1 - rho), damped by rho: (1 - rho)(1 + rho)
    assert first.skill["secant"] == pytest.approx(1 - 2 * (1 - rho), abs=0.03)
    assert first.skill["damped"] == pytest.approx(rho**2, abs=0.03)


def test_a_path_that_turns_back_closes_the_gate():
    weights = np.array([[0.0], [1.0]] * 5)
    gram = gram_of(weights)
    assert coherence(gram) == pytest.approx([-1.0] * 8)
    first = forecast(EVEN[:10], gram)[0]
    assert first.skill == {"secant": pytest.approx(-3), "ols": first.skill["ols"], "damped": 0, "extra": 0}
    assert advise(EVEN[:10], gram) is None


def test_what_a_jump_is_worth_is_read_off_the_run_itself():
    # Straight for 6 checkpoints, then still: from the third on, two ahead is one step's way too far.
    weights = np.array([[0.0], [1], [2], [3], [4], [5], [5], [5]])
    rows = forecast([float(i) for i in range(8)], gram_of(weights))
    # ahead 1 starts at 2 .. 6: targets 3, 4, 5, 5, 5; the secant is right, right, right, one too far, right (no drift)
    assert rows[0].skill["secant"] == pytest.approx(1 - 1 / 3)
    assert rows[0].worth["secant"] == pytest.approx(2 / 3)


def test_where_nothing_moves_nothing_is_claimed():
    gram = torch.zeros(5, 5, dtype=torch.float64)
    rows = forecast([0.0, 1, 2, 3, 4, 5], gram)
    assert all(value is None for row in rows for value in (*row.skill.values(), *row.worth.values()))
    assert coherence(gram) == [0.0] * 4 and advise([0.0, 1, 2, 3, 4, 5], gram) is None


def test_three_checkpoints_give_one_forecast_of_the_methods_that_need_no_third():
    (row,) = forecast([0.0, 1, 2], gram_of(np.array([[0.0], [1], [3]])))
    assert row.starts == 1 and row.skill == {"secant": 0.75, "ols": 0.75, "damped": None, "extra": None}


def test_chance_counts_the_sign_patterns():
    assert chance([0.5] * 4) == 1 / 16
    assert chance([0.0] * 4) == 1  # nothing to tell apart
    cosines = [0.6, -0.1, 0.3, 0.2]
    sums = [sum(s * c for s, c in zip(signs, cosines)) for signs in itertools.product((1, -1), repeat=4)]
    assert chance(cosines) == sum(s >= 1.0 - 1e-9 for s in sums) / 16
    assert chance([0.9] * 20) == pytest.approx(1 / 65537) and 0.3 < chance([0.1, -0.1] * 15) < 0.8


def test_thinning_is_that_of_the_weights():
    weights = walk(UNEVEN, 12, 0.3)
    steps, gram = thin(UNEVEN, gram_of(weights), 3)
    assert steps == UNEVEN[1::3]
    torch.testing.assert_close(gram, gram_of(weights[1::3]))


def test_distances_are_those_of_the_weights():
    weights = walk(UNEVEN, 12)
    expected = ((weights[:, None] - weights[None]) ** 2).sum(-1)
    torch.testing.assert_close(distances(gram_of(weights)), torch.from_numpy(expected), atol=1e-9, rtol=1e-9)


def test_too_few_checkpoints_get_no_advice():
    steps = [0.0, 1, 2, 3]
    assert advise(steps, gram_of(np.outer(steps, [1.0]))) is None


paths = st.integers(0, 2**31).map(lambda seed: walk(UNEVEN, 5, 0.5, seed))


@given(paths, st.sampled_from([1e-6, 0.1, 3.0, 1e4]), st.sampled_from([1, 7, 1000]))
def test_skill_knows_neither_the_weights_unit_nor_the_steps(weights: np.ndarray, scale: float, unit: int):
    one = forecast(UNEVEN, gram_of(weights))
    two = forecast([t * unit for t in UNEVEN], gram_of(weights * scale))
    for a, b in zip(one, two):
        assert b.steps == pytest.approx(a.steps * unit)
        # ExtraAdam's gate asks what momentum alone would show at this spacing, so it knows the unit of time
        for method in METHODS if unit == 1 else METHODS.keys() - {"extra"}:
            assert b.skill[method] == pytest.approx(a.skill[method], rel=1e-6, abs=1e-6)
            assert b.worth[method] == pytest.approx(a.worth[method] * unit, rel=1e-5, abs=1e-5 * unit)


@given(paths)
def test_gram_matrices_of_parts_add_up_to_that_of_the_whole(weights: np.ndarray):
    parts = gram_of(weights[:, :2]) + gram_of(weights[:, 2:])
    for a, b in zip(forecast(UNEVEN, parts), forecast(UNEVEN, gram_of(weights))):
        assert all(a.skill[m] == pytest.approx(b.skill[m], rel=1e-9, abs=1e-9) for m in METHODS)


@given(paths)
def test_a_gated_jump_is_bounded_and_skill_never_exceeds_one(weights: np.ndarray):
    for row in forecast(UNEVEN, gram_of(weights)):
        for method in METHODS:
            assert row.worst[method] <= row.skill[method] + 1e-12 <= 1 + 1e-9
            assert 0 <= row.worth[method] <= row.steps + 1e-9
