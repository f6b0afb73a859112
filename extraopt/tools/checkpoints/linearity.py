"""How straight was a run? The path of each weight over its checkpoints, beside what noise alone would look like.

A high R^2 of W(step) proves little: a walk with no direction at all has a median near 0.45 over 14 checkpoints, and one
may keep only weights that wandered far, which look straighter. So every R^2 comes with the fraction that a filter
kept, with the R^2 of random walks through the same arithmetic, and with the skill of real forecasts (see `forecast`).

Weights are streamed: a tensor at a time, from one checkpoint after the other. What is kept of it adds up over chunks,
tensors and layers.
"""

from __future__ import annotations

import re
import statistics
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...gate import momentum_coherence
from .family import check_same_family
from .forecast import advise, chance, forecast, reach
from .paths import PAPER, Filter, Paths, measure
from .read import Checkpoint, open_checkpoint
from .safety import CheckpointError

CHUNK = 2**22  # float64 numbers worked on at once: 32 MB, and a few copies of it
FEW = 5  # checkpoints below which no advice is given: one held-out forecast is an anecdote


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
    keep: Filter = PAPER,
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
        f" average and {_number(cosines[-1])} at the end. Of runs without a direction {by_chance:.2%} are as coherent;"
        f" momentum alone (beta1 0.9) would show {momentum_coherence(shortest_gap):.2f} at this spacing."
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
            " to where training went than the persistence baseline: the last drift unchanged, damped, ExtraAdam's jump."
        )
    elif any(far.values()):
        parts = [
            f"{words[method]} up to {_steps(held[-1].steps)}"
            if held
            else f"{words[method]} nowhere (skill {shortest[method]} at {_steps(rows[0].steps)})"
            for method, held in far.items()
        ]
        said.append(f"Reach: nearer to where training went than the persistence baseline is {'; '.join(parts)}.")
    else:
        said.append(
            f"{'From one drift' if advice else 'Do not extrapolate this run'}: {_steps(rows[0].steps)} ahead no"
            f" forecast is nearer to where training went than the persistence baseline (skill {shortest['secant']} for"
            f" the last drift going on, {shortest['damped']} damped, {shortest['extra']} for ExtraAdam's jump)."
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
