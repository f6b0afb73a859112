"""The statistics of benchmarks/reproduce.py: known parameters come back, estimators agree with brute force."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import statistics
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[2] / "benchmarks" / "reproduce_statistics.py"


@pytest.fixture(scope="module")
def stats() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce_statistics", FILE)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("drawn", "right"), [(1, 0), (5, 2), (7, 7), (8, 0), (9, 1)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(stats: ModuleType, drawn: int, right: int) -> None:
    answers = [i < right for i in range(drawn)]
    for k in range(1, drawn + 1):
        subsets = list(itertools.combinations(answers, k))
        assert stats.pass_at_k(drawn, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased(stats: ModuleType) -> None:
    p, drawn, k = 0.3, 12, 5
    chances = [math.comb(drawn, r) * p**r * (1 - p) ** (drawn - r) for r in range(drawn + 1)]
    mean = sum(chance * stats.pass_at_k(drawn, r, k) for r, chance in enumerate(chances))
    assert mean == pytest.approx(1 - (1 - p) ** k)


@pytest.mark.parametrize(("drawn", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 5), (4, 1, 0)])
def test_pass_at_k_refuses_what_it_can_not_estimate(stats: ModuleType, drawn: int, right: int, k: int) -> None:
    with pytest.raises(ValueError):
        stats.pass_at_k(drawn, right, k)


def test_few_runs_are_resampled_exactly(stats: ModuleType) -> None:
    runs = [0.1, 0.4, 0.9, 1.0]
    means = sorted(statistics.fmean(chosen) for chosen in itertools.product(runs, repeat=len(runs)))
    low, high = stats.bootstrap(runs, statistics.fmean, level=0.8)
    assert low == pytest.approx(means[math.ceil(0.1 * len(means)) - 1])
    assert high == pytest.approx(means[math.ceil(0.9 * len(means)) - 1])


def test_an_interval_covers_the_truth_as_often_as_it_says(stats: ModuleType) -> None:
    dice, covered, trials = random.Random(0), 0, 150
    for trial in range(trials):
        sample = [dice.gauss(3, 2) for _ in range(25)]
        low, high = stats.bootstrap(sample, lambda x: sum(x) / len(x), level=0.9, seed=trial)
        covered += low <= 3 <= high
    assert 0.8 < covered / trials < 0.96  # 0.9, less a little for 25 values; the standard error is 0.025


def test_runs_that_never_arrive_reach_into_the_interval(stats: ModuleType) -> None:
    low, high = stats.bootstrap([10.0, 20.0, math.inf], statistics.median)
    assert (low, high) == (10, math.inf)
    assert all(map(math.isnan, stats.bootstrap([1.0, 2.0], lambda _: math.nan)))
    assert stats.bootstrap([5.0], statistics.fmean) == (5, 5)


def test_mean_and_error_are_the_textbooks(stats: ModuleType) -> None:
    values = [0.0, 1.0, 1.0, 0.5]
    mean, error = stats.mean_and_error(values)
    assert mean == pytest.approx(0.625) and error == pytest.approx(statistics.stdev(values) / 2)
    assert math.isnan(stats.mean_and_error([1.0])[1])


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize(("a", "mid", "b"), [(0.8, 60, 2.0), (0.62, 25, 1.0), (0.95, 110, 4.0)])
def test_a_fit_recovers_the_curve_it_was_made_from(
    stats: ModuleType, a: float, mid: float, b: float, given: bool
) -> None:
    truth = stats.Sigmoid(0.2, a, mid, b, 1.0, False)
    steps = list(range(0, 241, 10))
    fit = stats.fit_sigmoid(steps, [truth(s) for s in steps], start=0.2 if given else None)
    assert fit.asymptote == pytest.approx(a, abs=2e-3) and fit.midpoint == pytest.approx(mid, rel=1e-2)
    assert fit.steepness == pytest.approx(b, rel=2e-2) and fit.start == pytest.approx(0.2, abs=2e-3)
    assert fit.r2 > 0.9999 and not fit.bound


def test_a_fit_through_noise_is_near_the_truth(stats: ModuleType) -> None:
    dice, truth = random.Random(1), stats.Sigmoid(0.2, 0.8, 60, 2.0, 1.0, False)
    steps = list(range(0, 241, 4))
    fits = [stats.fit_sigmoid(steps, [truth(s) + dice.gauss(0, 0.02) for s in steps], start=0.2) for _ in range(20)]
    assert statistics.fmean(fit.asymptote for fit in fits) == pytest.approx(0.8, abs=0.01)
    assert statistics.fmean(fit.midpoint for fit in fits) == pytest.approx(60, rel=0.05)


def test_a_curve_that_still_rises_has_its_asymptote_at_the_ceiling(stats: ModuleType) -> None:
    steps = list(range(0, 101, 10))
    for start in 0.1, None:
        fit = stats.fit_sigmoid(steps, [0.1 + 0.005 * s for s in steps], start=start)
        assert fit.bound and fit.asymptote == pytest.approx(1)


def test_a_fit_takes_four_points(stats: ModuleType) -> None:
    with pytest.raises(ValueError):
        stats.fit_sigmoid([0, 1, 2], [0.1, 0.2, 0.3])
    with pytest.raises(ValueError):
        stats.fit_sigmoid([0, 1, 2, 3], [0.1, 0.2, 0.3])
