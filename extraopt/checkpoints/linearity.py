"""How straight was a run? The path of each weight over its checkpoints, beside what noise alone would look like.

A high R^2 of W(step) proves little: a walk with no direction at all has a median near 0.45 over 14 checkpoints, and one
may keep only weights that wandered far, which look straighter. So every R^2 comes with the fraction that a filter
kept, with the R^2 of random walks through the same arithmetic, and with the skill of real forecasts (see `forecast`).

Weights are streamed: a tensor at a time, from one checkpoint after the other. What is kept of it adds up over chunks,
tensors and layers.
"""

from __future__ import annotations

import math
import re
import statistics
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .forecast import advise, chance, coherence, forecast, reach
from .read import Checkpoint, CheckpointError, check_same_family, open_checkpoint

BINS = 2000  # of an R^2 histogram: medians are read off it, right to 1 / 4000
STRAIGHT = 0.7  # the R^2 above which the paper calls a weight linear
CHUNK = 2**22  # float64 numbers worked on at once: 32 MB, and a few copies of it
WALKS = 4096  # random walks at least for each tensor's null
HISTOGRAMS = ("all", "kept", "walks", "walks_kept")
FEW = 5  # checkpoints below which no advice is given: one held-out forecast is an anecdote


@dataclass(frozen=True)
class Filter:
    """Which weights count as having moved: the paper's analysis keeps only these.

    Attributes:
        min_move: keep a weight if max - min over the checkpoints is above this, in weight units.
        min_values: and if it took at least so many distinct values, as stored.
    """

    min_move: float = 1e-4
    min_values: int = 4


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


def layer_type(name: str) -> str:
    """A tensor's name without numbers and wrappers: `self_attn.q_proj`, `mlp.experts.down_proj`, `q_proj.lora_A`."""
    parts = [part for part in name.split(".") if not part.isdigit()]
    if len(parts) > 1 and parts[-1] == "weight":
        parts.pop()
    return ".".join(parts[-3 if parts[-1] == "bias" or "experts" in parts[-2:-1] else -2 :])


def layer_number(name: str) -> int | None:
    """The first number in a tensor's name; None outside the layers."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _blocks(checkpoint: Checkpoint, name: str, elements: int) -> Iterator[Tensor]:
    """A tensor in flat pieces, each checked to be finite."""
    held = checkpoint.resolve(name)
    assert held is not None  # they are of one family
    for block in checkpoint.blocks(held, elements):
        bounds = torch.stack((block if block.element_size() > 1 else block.float()).aminmax())  # NaN passes through
        if not bounds.isfinite().all():
            raise CheckpointError(f"{checkpoint.path}: {name} has weights that are NaN or infinite")
        yield block


def _chunks(checkpoints: Sequence[Checkpoint], name: str, chosen: Tensor | None) -> Iterator[Tensor]:
    """Values [checkpoints, some weights] of a tensor: of the chosen ones (ascending places), or of all in turn."""
    if chosen is None:
        for blocks in zip(*(_blocks(checkpoint, name, CHUNK // len(checkpoints)) for checkpoint in checkpoints)):
            yield torch.stack(blocks)
        return
    ends = torch.arange(CHUNK, int(chosen[-1]) + 1 + CHUNK, CHUNK)  # of the blocks, to find which places lie in each
    places = [part % CHUNK for part in chosen.tensor_split(torch.searchsorted(chosen, ends)[:-1])]
    rows = []
    for checkpoint in checkpoints:
        drawn = []
        for i, block in enumerate(_blocks(checkpoint, name, CHUNK)):
            if i < len(places):  # the blocks after the last chosen place are only checked
                drawn.append(block[places[i]])
        rows.append(torch.cat(drawn))
    yield torch.stack(rows)


def linearity(
    checkpoints: Sequence[tuple[int, Path]],
    *,
    sample: int | None = 20_000,
    keep: Filter = Filter(),
    seed: int = 0,
    progress: Callable[[float, float], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Measure how straight a run was: per tensor, per layer type and over all weights.

    Args:
        checkpoints: (optimizer step, folder or file) of at least three checkpoints of one run.
        sample: weights to draw from each tensor, with replacement; None takes all. Tensors no larger are taken whole.
        keep: the filter whose effect to show.
        seed: of the sample and of the random walks.
        progress: called with (tensors done, tensors in all).

    Returns:
        Plain numbers, ready for JSON: "steps", "checkpoints", "total", "types", "tensors" (see `Paths.summary`),
        "histogram" (of R^2, its null, in 50 bins), "advice" and "verdict", a list of sentences.

    Raises:
        CheckpointError: fewer than three checkpoints, a step that comes twice, or checkpoints that do not fit together.
    """
    checkpoints = sorted(checkpoints)
    steps = [float(step) for step, _ in checkpoints]
    if len(steps) < 3:
        raise CheckpointError(f"{len(steps)} checkpoints given: a path takes three at least, a verdict {FEW}")
    for (step, one), (other, two) in zip(checkpoints, checkpoints[1:]):
        if step == other:
            raise CheckpointError(f"{one} and {two} are both of step {step}")
    opened = [open_checkpoint(path) for _, path in checkpoints]
    for later in opened[1:]:
        check_same_family(opened[0], later)
    first = opened[0]
    places = {(info.file, info.offset): name for name, info in reversed(first.infos.items()) if info.numel}
    # a .bin lists tied tensors under every name, but they are one
    names = [name for name in first.names if name in places.values() and first.dtype(name).is_floating_point]
    if not names:
        raise CheckpointError(f"{first.path}: no floating-point tensor in it")
    total, types, tensors = Paths(steps), dict[str, Paths](), dict[str, Any]()
    for done, name in enumerate(names):
        progress(done, len(names))
        size, key = first.infos[name].numel, zlib.crc32(name.encode()) + seed
        chosen = None
        if sample is not None and size > sample:
            chosen = torch.randint(size, (sample,), generator=torch.Generator().manual_seed(key)).sort().values
        count = size if chosen is None else len(chosen)
        paths = measure(_chunks(opened, name, chosen), steps, count, keep=keep, weight=size / count, seed=key)
        total.add(paths)
        types.setdefault(layer_type(name), Paths(steps)).add(paths)
        tensors[name] = paths.summary(horizons=False) | {"type": layer_type(name), "layer": layer_number(name)}
    summary = total.summary()
    advice = advise(steps, total.gram) if len(steps) >= FEW else None
    return {
        "checkpoints": [str(path) for _, path in checkpoints],
        "steps": [step for step, _ in checkpoints],
        "sample": sample,
        "seed": seed,
        "filter": asdict(keep),
        "total": summary,
        "types": {name: types[name].summary() for name in types},
        "tensors": tensors,
        "histogram": total.histogram(),
        "advice": asdict(advice) if advice else None,
        "verdict": verdict(steps, total, summary),
    }


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{round(value, 2) + 0:.2f}"  # + 0: no minus zero


def _steps(value: float) -> str:
    return f"{value:.0f} step{'' if round(value) == 1 else 's'}"


def verdict(steps: Sequence[float], total: Paths, summary: dict[str, Any]) -> list[str]:
    """What the figures of all weights together say, in words: how far this run can be extrapolated.

    Args:
        steps: the checkpoints' steps.
        total: the paths of all weights.
        summary: `total.summary()`.
    """
    if not total.gram.any():
        return [f"Nothing moved: the {len(steps)} checkpoints hold the same weights."]
    cosines, gaps = summary["coherence"], torch.tensor(steps, dtype=torch.float64).diff()
    shortest_gap, longest_gap = float(gaps.min()), float(gaps.max())
    spacing = ("" if shortest_gap == longest_gap else f"{shortest_gap:.0f} to ") + _steps(longest_gap)
    low, high = summary["null_5_95"]
    said = [
        f"Fit: half of the weights that moved have an R^2 above {summary['r2_median']:.2f}. A walk without a direction"
        f" has {summary['null_median']:.2f}, and anything from {low:.2f} to {high:.2f} if the weights move as one."
    ]
    if summary["kept"] > 0:
        said[0] += (
            f" The filter keeps {summary['kept']:.1%} of them, at a median of {summary['kept_r2_median']:.2f};"
            f" of the walks {summary['null_kept']:.1%}"
        )
        null = summary["null_kept_r2_median"]
        said[0] += "." if null is None else f", at {null:.2f}."
    by_chance = chance(cosines)
    said.append(
        f"Direction: consecutive drifts, {spacing} each, have a cosine of {_number(summary['coherence_mean'])} on"
        f" average and {_number(cosines[-1])} at the end. Of runs without a direction {by_chance:.2%} are as coherent."
    )
    rows = forecast(steps, total.gram)
    shortest = {method: _number(value) for method, value in rows[0].skill.items()}
    if len(steps) < FEW:
        said.append(
            f"Too few checkpoints: {len(steps)} allow a single held-out forecast (skill {shortest['secant']} for the"
            f" last drift going on). Save {FEW} at least, better 10 or more, for a verdict on how far to extrapolate."
        )
        return said
    advice = advise(steps, total.gram)
    words = {
        "secant": "the last drift, unchanged,",
        "damped": "the same, damped,",
        "extra": "ExtraAdam's jump",
    }
    far = {method: reach(rows, method) for method in words}
    if all(len(held) == len(rows) for held in far.values()):
        said.append(
            f"Reach: up to {_steps(rows[-1].steps)}, the longest horizon that could be tested, every forecast is nearer"
            " to where training went than standing still: the last drift unchanged, damped, and ExtraAdam's jump."
        )
    elif any(far.values()):
        parts = [
            f"{words[method]} up to {_steps(held[-1].steps)}"
            if held
            else f"{words[method]} nowhere (skill {shortest[method]} at {_steps(rows[0].steps)})"
            for method, held in far.items()
        ]
        said.append(f"Reach: nearer to where training went than standing still is {'; '.join(parts)}.")
    else:
        said.append(
            f"{'From one drift' if advice else 'Do not extrapolate this run'}: {_steps(rows[0].steps)} ahead no"
            f" forecast is nearer to where training went than standing still (skill {shortest['secant']} for the last"
            f" drift going on, {shortest['damped']} damped, {shortest['extra']} for ExtraAdam's jump)."
        )
    if advice:
        said.append(
            f"Try extra_every={advice.extra_every}, extra_steps={advice.extra_steps}: on this path such a jump would"
            f" have been worth about {_steps(advice.worth)} (skill {advice.skill:.2f}, {advice.starts} starts). Cycles"
            f" shorter than {_steps(shortest_gap)} can't be judged from these checkpoints."
        )
    elif any(far.values()):
        said.append("But ExtraAdam's own jump gains nothing that two held-out forecasts confirm: extra_steps=0.")
    third = max(1, len(cosines) // 3)
    early, late = statistics.fmean(cosines[:third]), statistics.fmean(cosines[-third:])
    if advice and len(cosines) >= 6 and late < early - 0.2:
        said.append(
            f"The direction fades, from {early:.2f} to {late:.2f}: jump less far towards the end than at first."
        )
    if advice and by_chance > 0.05:
        said.append("Take this with care: so few drifts can agree by chance. More checkpoints would tell.")
    if summary["rounding_share"] > 0.1:
        said.append(
            f"Storage hides the path: rounding makes up about {summary['rounding_share']:.0%} of what moves between"
            f" checkpoints, and {summary['unchanged']:.0%} of the weights do not change from one to the next. Cosines"
            " and skill are understated; save checkpoints in float32 to see the run itself."
        )
    return said
