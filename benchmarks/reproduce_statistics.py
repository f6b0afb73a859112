"""The statistics of benchmarks/reproduce.py: pass@k, the bootstrap over seeds, and the sigmoid of reward by compute."""

from __future__ import annotations

import itertools
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")
RESAMPLES = 2000  # where there are too many to take them all
MOST_RUNS = 6  # of which every resample is taken: 462 different ones of six


def pass_at_k(drawn: int, right: int, k: int) -> float:
    """The chance that `k` of `drawn` answers, taken without putting back, have a right one among them.

    Unbiased for the chance that `k` new samples have one: Chen et al., "Evaluating Large Language Models Trained on
    Code", arXiv 2107.03374, section 2.1.

    Raises:
        ValueError: fewer answers than `k`, or more right ones than answers.
    """
    if not 0 <= right <= drawn or not 1 <= k <= drawn:
        raise ValueError(f"{right} right of {drawn} answers, k = {k}")
    return 1 - math.comb(drawn - right, k) / math.comb(drawn, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error, for independent values; the error of a single one is nan."""
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def bootstrap(
    runs: Sequence[T], statistic: Callable[[Sequence[T]], float], *, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic over runs drawn with replacement.

    Up to six runs, every resample counts with its exact weight; of more, 2,000 random ones. Few runs make an interval
    that is too narrow: of three it can't leave the range of the three. Infinities (never reached) are ordinary values.

    Args:
        runs: one or more, such as the rows of different seeds.
        statistic: of as many runs; nan where there is none, and such resamples don't count.
        level: share of the resamples between the two ends.
        seed: of the random resamples.

    Returns:
        The lower and the upper end; nan where no resample has a value.
    """
    count, weights = len(runs), Counter[tuple[int, ...]]()
    if count <= MOST_RUNS:
        for chosen in itertools.combinations_with_replacement(range(count), count):
            times = math.factorial(count)
            for of in Counter(chosen).values():
                times //= math.factorial(of)
            weights[chosen] = times
    else:
        dice = random.Random(seed)
        weights.update(tuple(dice.choices(range(count), k=count)) for _ in range(RESAMPLES))
    found = [(statistic([runs[i] for i in chosen]), times) for chosen, times in weights.items()]
    found = sorted(pair for pair in found if not math.isnan(pair[0]))
    total, below, ends = sum(times for _, times in found), 0, []
    targets = [(1 - level) / 2 * total, (1 + level) / 2 * total]
    for value, times in found:
        below += times
        while targets and below >= targets[0] and below > 0:
            ends.append(value)
            targets.pop(0)
    return (ends[0], ends[1]) if len(ends) == 2 else (math.nan, math.nan)


@dataclass(frozen=True)
class Sigmoid:
    """R(C) = start + (asymptote - start) / (1 + (midpoint / C)^steepness).

    The form and its names (R_0, A, C_mid, B) are those of "The Art of Scaling Reinforcement Learning Compute for LLMs",
    arXiv 2510.13786, equation 1.

    Attributes:
        start: reward at no compute.
        asymptote: reward that the curve tends to.
        midpoint: compute, in the unit given, at half of the way.
        steepness: exponent; higher: a later and sharper rise.
        r2: share of the variance of the rewards that the curve explains; negative where a constant would be better.
        bound: the asymptote is the highest possible reward: the data do not show where the curve levels off.
    """

    start: float
    asymptote: float
    midpoint: float
    steepness: float
    r2: float
    bound: bool

    def __call__(self, compute: float) -> float:
        """The reward at so much compute."""
        if compute <= 0:
            return self.start
        return self.start + (self.asymptote - self.start) / (1 + (self.midpoint / compute) ** self.steepness)


def fit_sigmoid(
    compute: Sequence[float], rewards: Sequence[float], *, start: float | None = None, ceiling: float = 1.0
) -> Sigmoid:
    """Least squares: for each midpoint and steepness of a grid the rest is linear, then the grid narrows five times.

    Midpoints are searched from a tenth of the first positive compute to ten times the last, exponents from 0.3 to 10.
    Without a global optimizer there is nothing to start wrongly, and the same data give the same fit.

    Args:
        compute: at each reward, 0 or more, in any unit; at least four different ones.
        rewards: as many.
        start: reward at no compute; None: fitted too.
        ceiling: the highest possible reward; the asymptote lies between 0 and this.

    Raises:
        ValueError: lengths that differ, or too few points.
    """
    if len(compute) != len(rewards) or len(set(compute)) < 4:
        raise ValueError(f"{len(compute)} points of compute and {len(rewards)} rewards: four at least, as many of each")
    x = torch.tensor(compute, dtype=torch.float64)
    y = torch.tensor(rewards, dtype=torch.float64)
    positive = x[x > 0]
    low, high = math.log(positive.min() / 10), math.log(positive.max() * 10)
    steep_low, steep_high = math.log(0.3), math.log(10)
    best: tuple[float, ...] = (math.inf,)
    for _ in range(6):
        mids = torch.linspace(low, high, 80, dtype=torch.float64)
        steeps = torch.linspace(steep_low, steep_high, 40, dtype=torch.float64)
        mid, steep = (each.reshape(-1, 1) for each in torch.meshgrid(mids, steeps, indexing="ij"))
        share = torch.where(x > 0, torch.sigmoid(steep.exp() * (x.clamp(min=1e-300).log() - mid)), 0.0)
        if start is None:  # both ends of the curve by linear least squares
            centred = share - share.mean(1, keepdim=True)
            gain = (centred * (y - y.mean())).sum(1) / centred.square().sum(1).clamp(min=1e-12)
            base = y.mean() - gain * share.mean(1)
            top = (base + gain).clamp(0, ceiling)
            rest = 1 - share  # with the asymptote held: y = top - (top - base) (1 - share)
            held = top - ((top[:, None] - y) * rest).sum(1) / rest.square().sum(1).clamp(min=1e-12)
            base = torch.where(top == base + gain, base, held)
        else:
            base = torch.full((len(share),), start, dtype=torch.float64)
            gain = (share * (y - start)).sum(1) / share.square().sum(1).clamp(min=1e-12)
            top = (base + gain).clamp(0, ceiling)
        loss = (base[:, None] + (top - base)[:, None] * share - y).square().sum(1)
        i = int(loss.argmin())
        if float(loss[i]) < best[0]:
            best = tuple(map(float, (loss[i], base[i], top[i], mid[i], steep[i])))
        width, steep_width = (high - low) / 8, (steep_high - steep_low) / 8
        low, high = best[3] - width, best[3] + width
        steep_low, steep_high = max(best[4] - steep_width, math.log(0.3)), min(best[4] + steep_width, math.log(10))
    spread = float((y - y.mean()).square().sum())
    r2 = 1 - best[0] / spread if spread > 0 else math.nan
    return Sigmoid(best[1], best[2], math.exp(best[3]), math.exp(best[4]), r2, best[2] >= ceiling - 1e-6)
