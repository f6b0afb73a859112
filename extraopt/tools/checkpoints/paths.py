"""The paths of weights over checkpoints: R^2 with its null, slopes, and the inner products of drifts. Sets add up."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from .forecast import coherence, forecast

BINS = 2000  # of an R^2 histogram: medians are read off it, right to 1 / 4000
STRAIGHT = 0.7  # the R^2 above which the paper calls a weight linear
WALKS = 4096  # random walks at least for each tensor's null
HISTOGRAMS = ("all", "kept", "walks", "walks_kept")


@dataclass(frozen=True)
class Filter:
    """Which weights count as having moved: the paper's analysis keeps only these.

    Attributes:
        min_move: keep a weight if max - min over the checkpoints is above this, in weight units.
        min_values: and if it took at least so many distinct values, as stored.
    """

    min_move: float = 1e-4
    min_values: int = 4


PAPER = Filter()


def fit(values: Tensor, t: Tensor, keep: Filter) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Least squares of each column on t: slope, R^2 (0 where nothing moved), which moved, which the filter keeps."""
    moved = values - values[0]
    centred, times = moved - moved.mean(0), t - t.mean()
    moving = (moved != 0).any(0)
    slope = times @ centred / times.square().sum()
    total = centred.square().sum(0)
    r2 = (slope.square() * times.square().sum() / total.where(moving, 1.0)).clamp(max=1) * moving
    kept = moving & (moved.amax(0) - moved.amin(0) > keep.min_move)
    if keep.min_values > 2 and kept.any():
        some = values[:, kept].sort(dim=0).values
        kept[kept.clone()] = (some.diff(dim=0) != 0).sum(0) + 1 >= keep.min_values
    return slope, r2, moving, kept


def _bins(r2: Tensor) -> Tensor:
    return torch.bincount((r2 * BINS).long().clamp(max=BINS - 1), minlength=BINS).double()


def _quantile(histogram: Tensor, q: float) -> float | None:
    """Linear within a bin, halfway across empty ones; None of nothing."""
    total = float(histogram.sum())
    if total == 0:
        return None
    below = histogram.cumsum(0)
    ends = []
    for right in (False, True):  # they differ where exactly that share lies below a gap
        i = min(int(torch.searchsorted(below, q * total, right=right)), len(histogram) - 1)
        inside = (q * total - float(below[i] - histogram[i])) / max(float(histogram[i]), 1e-300)
        ends.append((i + min(1.0, max(0.0, inside))) / len(histogram))
    return sum(ends) / 2


def _above(histogram: Tensor) -> float | None:
    total = float(histogram.sum())
    return float(histogram[round(STRAIGHT * BINS) :].sum()) / total if total else None


def _spacing(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of `dtype` around each value, float64; 0 at 0."""
    exponent = torch.frexp(values).exponent
    return (values != 0) * torch.finfo(dtype).eps * torch.exp2(exponent.double() - 1)


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


@dataclass
class Paths:
    """What is known of a set of weights' paths; sets add up.

    Counts are of weights stood for: a sample's are scaled up to its tensor.

    Attributes:
        steps: the checkpoints' steps.
        elements, constant, kept: all weights, those that never moved, those that the filter keeps.
        walks_kept: how many the filter would keep of random walks, out of `elements`.
        r2: histograms of R^2, float64 [BINS]: "all" weights that moved, those "kept", and "walks", "walks_kept".
        gram: inner products of the drifts, float64 [n, n].
        slopes, slopes2, squares: sums of |slope|, slope^2 and of the last checkpoint's squared weights.
        unchanged: sum over the drifts of how many weights had exactly the same value before and after.
        rounding: sum of what storage alone adds to one squared drift (spacing^2 / 6: two roundings).
    """

    steps: list[float]
    elements: float = 0.0
    constant: float = 0.0
    kept: float = 0.0
    walks_kept: float = 0.0
    r2: dict[str, Tensor] = field(default_factory=lambda: {k: _zeros(BINS) for k in HISTOGRAMS})
    gram: Tensor = field(default_factory=lambda: _zeros(0, 0))
    slopes: float = 0.0
    slopes2: float = 0.0
    squares: float = 0.0
    unchanged: float = 0.0
    rounding: float = 0.0
    tensors: int = 0

    def __post_init__(self) -> None:
        if not len(self.gram):
            self.gram = _zeros(len(self.steps) - 1, len(self.steps) - 1)

    def add(self, other: Paths) -> None:
        """Take in the weights of another set, over the same steps."""
        for name, value in vars(other).items():
            if name == "r2":
                for key, histogram in value.items():
                    self.r2[key] = self.r2[key] + histogram
            elif name != "steps":
                setattr(self, name, getattr(self, name) + value)

    def histogram(self) -> dict[str, list[float]]:
        """The R^2 histograms in 50 bins, as plain numbers for JSON."""
        return {key: self.r2[key].view(50, -1).sum(1).tolist() for key in HISTOGRAMS}

    def summary(self, *, horizons: bool = True) -> dict[str, Any]:
        """The figures, as plain numbers for JSON; None where there is nothing to measure.

        Args:
            horizons: the skill at every horizon, else only at the shortest.
        """
        count, drifts = max(self.elements, 1.0), len(self.steps) - 1
        cosines = coherence(self.gram)
        energy = float(self.gram.diagonal().mean())
        rows = forecast(self.steps, self.gram, None if horizons else 1)
        walks = self.r2["walks"]
        return {
            "tensors": self.tensors,
            "elements": round(self.elements),
            "constant": self.constant / count,
            "slope_rms": math.sqrt(self.slopes2 / count),
            "slope_mean_abs": self.slopes / count,
            "weight_rms": math.sqrt(self.squares / count),
            "r2_median": _quantile(self.r2["all"], 0.5),
            "r2_above": _above(self.r2["all"]),
            "null_median": _quantile(walks, 0.5),
            "null_above": _above(walks),
            "null_5_95": [_quantile(walks, 0.05), _quantile(walks, 0.95)],
            "kept": self.kept / count,
            "kept_r2_median": _quantile(self.r2["kept"], 0.5),
            "kept_r2_above": _above(self.r2["kept"]),
            "null_kept": self.walks_kept / count,
            "null_kept_r2_median": _quantile(self.r2["walks_kept"], 0.5),
            "null_kept_r2_above": _above(self.r2["walks_kept"]),
            "drift_rms": math.sqrt(energy / count),
            "unchanged": self.unchanged / (count * drifts),
            "rounding_share": min(1.0, self.rounding / energy) if energy > 0 else 0.0,
            "coherence": cosines,
            "coherence_mean": statistics.fmean(cosines),
            "skill": [asdict(row) for row in rows],
        }


def random_walks(start: Tensor, scale: float, t: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Paths without a direction, as they would have been stored: float64 [checkpoints, walks].

    Args:
        start: first stored values, float64 [walks]. The true value is taken to lie anywhere that rounds to it.
        scale: standard deviation after one step; it grows with the square root of the steps.
        t: steps of the checkpoints, float64.
        dtype: what checkpoints are stored in.
        generator: for the draws.
    """
    normal = torch.randn(len(t) - 1, len(start), dtype=torch.float64, generator=generator)
    hidden = torch.rand(len(start), dtype=torch.float64, generator=generator) - 0.5
    walk = (normal * scale * t.diff().sqrt().unsqueeze(1)).cumsum(0)
    paths = torch.cat([_zeros(1, len(start)), walk]) + start + hidden * _spacing(start, dtype)
    return paths.to(dtype).double()


def measure(
    chunks: Iterable[Tensor], steps: Sequence[float], count: int, *, keep: Filter, weight: float = 1.0, seed: int = 0
) -> Paths:
    """The paths of one tensor's weights, and of random walks of the same size.

    The walks' scale comes from the mean absolute drift. Rounding leaves that mean unbiased, however coarse the storage
    is against the drift, which is not so for its square.

    Args:
        chunks: values [checkpoints, some weights] in the dtype they are stored in, `count` weights together.
        steps: of the checkpoints, ascending, in optimizer steps.
        count: weights in all chunks.
        keep: the filter.
        weight: how many weights each one stands for.
        seed: of the random walks.
    """
    t = torch.tensor(steps, dtype=torch.float64)
    paths = Paths(list(steps), elements=count * weight, tensors=1)
    starts, done, travelled, dtype = [], 0, 0.0, torch.float32
    stride = -(-count // WALKS)
    for stored in chunks:
        dtype, values = stored.dtype, stored.double()
        slope, r2, moving, kept = fit(values, t, keep)
        drifts = values.diff(dim=0)
        paths.gram += weight * (drifts @ drifts.T)
        paths.r2["all"] += weight * _bins(r2[moving])
        paths.r2["kept"] += weight * _bins(r2[kept])
        paths.constant += weight * float((~moving).sum())
        paths.kept += weight * float(kept.sum())
        paths.slopes += weight * float(slope.abs().sum())
        paths.slopes2 += weight * float(slope.square().sum())
        paths.squares += weight * float(values[-1].square().sum())
        paths.unchanged += weight * float((drifts == 0).sum())
        paths.rounding += weight * float(_spacing(values[0], dtype).square().sum()) / 6
        travelled += float(drifts.abs().sum())
        starts.append(values[0, -done % stride :: stride].clone())  # a view would keep the whole chunk alive
        done += values.shape[1]
    if travelled > 0:
        scale = travelled / count / float(t.diff().sqrt().sum()) * math.sqrt(math.pi / 2)
        start = torch.cat(starts)
        start = start[torch.arange(max(WALKS, len(start))) % len(start)]
        walks = random_walks(start, scale, t, dtype, torch.Generator().manual_seed(seed))
        _, r2, moving, kept = fit(walks, t, keep)
        stood_for = count * weight / len(start)
        paths.r2["walks"] += stood_for * _bins(r2[moving])
        paths.r2["walks_kept"] += stood_for * _bins(r2[kept])
        paths.walks_kept += stood_for * float(kept.sum())
    return paths
