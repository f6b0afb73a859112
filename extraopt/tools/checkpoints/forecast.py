"""How well a path could have been forecast: pure functions of the times and inner products of its drifts.

A run with checkpoints W_0 .. W_n at steps t_0 < .. < t_n has drifts D_i = W_(i+1) - W_i. Every forecast below is a sum
of drifts, so that its squared error needs nothing but their Gram matrix G[i, j] = <D_i, D_j>: float64 [n, n], however
large the model. Gram matrices add up over chunks, tensors and layers.

The score is the skill against the persistence baseline (no change), 1 - ||forecast - W||^2 / ||latest - W||^2: 1 is a
perfect forecast, 0 is worth nothing, and below 0 the jump lands further from the weights that training reached than it
set out.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...gate import averaged_noise, noise_floor, openness, plain_weights
from ...hyperparameters import DEFAULTS

METHODS = {
    "secant": "the last drift goes on unchanged (RL-Extra, arXiv 2601.04537)",
    "ols": "the straight line through all checkpoints so far, by least squares",
    "damped": "the last drift, times how much of the drift before it came again in it",
    "extra": "ExtraAdam's jump by its defaults: drifts averaged, times one gate for all, of the whole horizon",
}
MOMENTUM = 0.9  # AdamW's default beta1: checkpoints of weights don't tell the run's
WORTHWHILE = 0.05  # skill from which a horizon counts as within reach: less is noise on real runs


@dataclass(frozen=True)
class Horizon:
    """The skill of forecasts a number of checkpoints ahead, over every checkpoint that they can start from.

    Attributes:
        ahead: checkpoints ahead.
        steps: steps ahead, mean over the starts.
        starts: how many checkpoints forecasts started from.
        skill: for each method 1 - (sum of squared errors) / (sum of squared errors of persistence), or None
            where it has no forecast or nothing moved.
        worst: the lowest skill of any one start.
        worth: real steps that bring the weights as near to those `ahead` as the forecast does, in [0, steps].
    """

    ahead: int
    steps: float
    starts: int
    skill: dict[str, float | None] = field(default_factory=dict)
    worst: dict[str, float | None] = field(default_factory=dict)
    worth: dict[str, float | None] = field(default_factory=dict)


def coherence(gram: Tensor) -> list[float]:
    """cos(D_i, D_(i+1)) of consecutive drifts: what ExtraAdam's gate sees. 0 where a drift is 0."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    products = norms[:-1] * norms[1:]
    cosines = gram.diagonal(1) / products.where(products > 0, torch.inf)
    return [float(c) for c in cosines.clamp(-1, 1)]


def chance(cosines: Sequence[float]) -> float:
    """How often a path with no direction is as coherent on average: a sign-flip test, in (0, 1].

    If each drift had been as likely to point the other way, the signs of the cosines would be coin flips. Exact up to
    16 cosines, from 65536 seeded draws beyond. With m cosines it can't be below 2**-m: few checkpoints prove little.
    """
    values = torch.tensor(cosines, dtype=torch.float64)
    if len(values) <= 16:
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=len(values))), dtype=torch.float64)
    else:
        coins = torch.randint(2, (2**16, len(values)), generator=torch.Generator().manual_seed(0))
        signs = torch.cat([torch.ones(1, len(values)), 2.0 * coins - 1]).double()
    sums = signs @ values
    return float((sums >= values.sum() - 1e-12 * values.abs().sum()).double().mean())


def thin(steps: Sequence[float], gram: Tensor, stride: int) -> tuple[list[float], Tensor]:
    """The times and the Gram matrix of every `stride`-th checkpoint, counted back from the last."""
    kept = list(range(len(steps) - 1, -1, -stride))[::-1]
    group = torch.zeros(len(kept) - 1, len(steps) - 1, dtype=torch.float64)
    for row, (start, end) in enumerate(zip(kept, kept[1:])):
        group[row, start:end] = 1
    return [steps[i] for i in kept], group @ gram @ group.T


def distances(gram: Tensor) -> Tensor:
    """||W_i - W_j||^2 of all pairs of checkpoints, float64 [n + 1, n + 1]."""
    corner = torch.zeros(len(gram) + 1, len(gram) + 1, dtype=torch.float64)
    corner[1:, 1:] = gram.cumsum(0).cumsum(1)  # inner products of W_i - W_0 and W_j - W_0
    square = corner.diagonal()
    return (square.unsqueeze(1) + square - 2 * corner).clamp(min=0)


def _jump(method: str, t: Tensor, gram: Tensor, start: int, target: int) -> Tensor | None:
    """The coefficients of D_0 .. D_(start-1) in the forecast of W_target - W_start; None without enough checkpoints."""
    horizon, gaps = t[target] - t[start], t.diff()[:start]
    jump = torch.zeros(start, dtype=torch.float64)
    if method == "ols":
        seen = t[: start + 1]
        centred = seen - seen.mean()
        weights = 1 / len(seen) + (t[target] - seen.mean()) * centred / centred.square().sum()
        return -weights.cumsum(0)[:start]  # the weights of W_0 .. W_start sum to 1
    if method == "secant":
        jump[-1] = horizon / gaps[-1]
        return jump
    if start < 2:
        return None
    rates = gram[:start, :start] / gaps.outer(gaps)  # inner products of drifts per step
    if method == "damped":
        old, both = float(rates[-2, -2]), float(rates[-2, -1])
        jump[-1] = (min(1.0, max(0.0, both / old)) if old > 0 else 0.0) * horizon / gaps[-1]
        return jump
    gate, average = _estimate(rates, float(gaps[-1]))
    return gate * horizon * average / gaps


def _estimate(rates: Tensor, every: float) -> tuple[float, Tensor]:
    """ExtraAdam's gate after the last drift, and the weight of each drift in its estimate: float64 [drifts].

    Args:
        rates: inner products of the drifts per step, float64 [drifts, drifts].
        every: optimizer steps in a drift, for what momentum alone would show.
    """
    cov = var = torch.zeros(1, dtype=torch.float64)
    shares, gate, beta = torch.zeros(len(rates), dtype=torch.float64), 0.0, DEFAULTS["extra_beta"]
    for i in range(len(rates)):
        dot, norms = rates[i] @ shares, (rates[i, i].clamp(min=0) * (shares @ rates @ shares).clamp(min=0)).sqrt()
        cosine = (dot / norms).clamp(-1, 1) if norms > 0 else torch.zeros((), dtype=torch.float64)
        gate = float(openness(cosine.view(1), DEFAULTS["extra_gate"], noise_floor(cov, var))) if norms > 0 else 0.0
        share = plain_weights(torch.tensor([i]), beta).clamp(min=gate**2)
        cov, var = averaged_noise(cov, var, share, every, MOMENTUM)
        shares = shares * (1 - share)
        shares[i] += float(share)
    return gate, shares


def _ratio(error: Tensor, still: Tensor) -> float | None:
    return 1 - float(error) / float(still) if still > 0 else None


def forecast(steps: Sequence[float], gram: Tensor, longest: int | None = None) -> list[Horizon]:
    """The skill of every method at every horizon that the checkpoints allow.

    Args:
        steps: t_0 < .. < t_n, in optimizer steps; they need not be equally spaced.
        gram: inner products of the n drifts, float64 [n, n].
        longest: horizons to score, in checkpoints ahead; default: all.

    Returns:
        One entry for each number of checkpoints ahead. A start needs two drifts behind it, so that all methods can be
        compared; with three checkpoints there is none, and only `secant` and `ols` are scored, on one forecast.
    """
    t, last = torch.tensor(steps, dtype=torch.float64), len(steps) - 1
    first = min(2, last - 1)
    apart = distances(gram)
    rows = []
    for ahead in range(1, min(last - first, longest or last) + 1):
        begin = torch.arange(first, last - ahead + 1)
        reached = begin + torch.arange(ahead + 1).unsqueeze(1)  # [ahead + 1, starts]: the way that training went
        left = apart[reached, begin + ahead]  # squared distance to the target after 0, 1, .. ahead checkpoints
        passed = (t[reached] - t[begin]).mean(1)
        row = Horizon(ahead, float(passed[-1]), len(begin))
        for method in METHODS:
            errors = []
            for start in begin.tolist():
                jump = _jump(method, t, gram, start, start + ahead)
                if jump is not None:
                    miss = torch.cat([-jump, torch.ones(ahead, dtype=torch.float64)])
                    errors.append((miss @ gram[: start + ahead, : start + ahead] @ miss).clamp(min=0))
            if not errors:
                row.skill[method] = row.worst[method] = row.worth[method] = None
                continue
            error = torch.stack(errors)
            single = [s for s in map(_ratio, error, left[0]) if s is not None]
            row.skill[method] = _ratio(error.sum(), left[0].sum())
            row.worst[method] = min(single, default=None)
            row.worth[method] = _worth(float(error.sum()), left.sum(1), passed)
        rows.append(row)
    return rows


def _worth(error: float, left: Tensor, passed: Tensor) -> float | None:
    """The real steps after which training was as near to the target as the forecast: linear between checkpoints."""
    if left[0] <= 0:
        return None
    if error >= left[0] * (1 - 1e-9):  # rounding alone saves no step
        return 0.0
    i = int((left <= error).nonzero()[0])
    share = (float(left[i - 1]) - error) / float(left[i - 1] - left[i])
    return float(passed[i - 1] + share * (passed[i] - passed[i - 1]))


@dataclass(frozen=True)
class Advice:
    """Hyperparameters of ExtraAdam that the path speaks for.

    Attributes:
        extra_every: k, optimizer steps in a cycle: a multiple of the checkpoints' spacing.
        extra_steps: N, optimizer steps to jump.
        skill: of ExtraAdam's jump over N steps, on this path.
        worth: real steps that one such jump stood for.
        starts: how many jumps that was measured on.
    """

    extra_every: int
    extra_steps: int
    skill: float
    worth: float
    starts: int


def reach(rows: Sequence[Horizon], method: str, starts: int = 1) -> list[Horizon]:
    """The horizons, from the shortest on, at which a method is worth while; ends at the first where it is not.

    Args:
        rows: from `forecast`.
        method: one of `METHODS`.
        starts: how many starts a horizon must have been measured on.
    """

    def holds(row: Horizon) -> bool:
        skill = row.skill[method]
        return skill is not None and skill >= WORTHWHILE and row.starts >= starts

    return list(itertools.takewhile(holds, rows))


def advise(steps: Sequence[float], gram: Tensor) -> Advice | None:
    """The cycle and the jump that would have saved the most real steps for each one taken, or None if none would have.

    Cycles of 1, 2, .. checkpoints are tried, jumps within their reach, each measured on at least two starts. What is
    measured is one jump from the path that was taken: a run that has jumped before may be less, or more, regular.
    """
    found = []
    for stride in range(1, (len(steps) - 1) // 4 + 1):  # five checkpoints give two starts
        times, drifts = thin(steps, gram, stride)
        every = float(torch.tensor(times, dtype=torch.float64).diff().median())
        for row in reach(forecast(times, drifts), "extra", starts=2):
            skill, worth = row.skill["extra"], row.worth["extra"]
            if skill is not None and worth is not None:
                advice = Advice(max(1, round(every)), max(1, round(row.steps)), skill, worth, row.starts)
                found.append((worth / every, advice))
    return max(found, key=lambda pair: pair[0])[1] if found else None
