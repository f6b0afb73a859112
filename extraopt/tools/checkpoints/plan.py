"""The weight of each checkpoint in an extrapolated one, from steps and a distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .safety import CheckpointError


def coefficients(
    steps: Sequence[float], to: float, *, fit: Literal["line", "ols"] = "line", average: int = 1
) -> list[float]:
    """The weight of each checkpoint in the extrapolated one; they add up to 1.

    Args:
        steps: Of the checkpoints, increasing.
        to: Step to extrapolate to.
        fit: "line": the line through two points. "ols": each weight's least-squares line over all points (RELEX, arXiv
            2605.21468, without its rank-1 filter).
        average: Each point is the mean of so many checkpoints in a row (Extra-Merge, arXiv 2605.26484, averages first).

    Raises:
        CheckpointError: The steps do not increase, or there are not enough or too many points.
    """
    if any(not later > earlier for earlier, later in zip(steps, steps[1:])) or not all(map(math.isfinite, steps)):
        raise CheckpointError(f"The steps {list(steps)} do not increase. Give the checkpoints in order, or --steps.")
    if average < 1 or len(steps) % average:
        raise CheckpointError(f"{len(steps)} checkpoints can not be averaged {average} by {average}.")
    points = [sum(steps[i : i + average]) / average for i in range(0, len(steps), average)]
    if len(points) < 2:
        raise CheckpointError(f"{len(steps)} checkpoints averaged by {average} make {len(points)} point, not a line.")
    if fit == "line" and len(points) > 2:
        raise CheckpointError(f"A line goes through two points, not {len(points)}. Use --fit ols, or --average.")
    mean = sum(points) / len(points)
    spread = sum((point - mean) * (point - mean) for point in points)  # no power, which raises where it overflows
    if not 0 < spread < math.inf:
        raise CheckpointError(f"The steps {list(steps)} are too large or too close together.")
    of_points = [1 / len(points) + (to - mean) * (point - mean) / spread for point in points]
    return [weight / average for weight in of_points for _ in range(average)]


def line(
    found: list[tuple[int | None, Path]], alpha: float | None, to: float | None, steps: Sequence[float] | None,
    fit: Literal["line", "ols"], average: int,
) -> tuple[list[Path], list[float], float]:  # fmt: skip
    """The checkpoints, their weights in the sum, and alpha."""
    if (alpha is None) == (to is None):
        raise CheckpointError("Say how far: either --alpha, or --to with the steps of the checkpoints.")
    if len(found) < 2:
        raise CheckpointError(f"{found[0][1]}: it takes two checkpoints to make a line.")
    if steps is None:
        of_run = [step for step, _ in found if step is not None]
        if len(of_run) == len(found):
            steps = of_run
        elif alpha is not None and len(found) == 2 * average:
            steps = range(len(found))  # alpha is in distances between two points, wherever they are
        else:
            raise CheckpointError("The folders' names do not end in steps of one run. Give --steps.")
    if len(steps) != len(found):
        raise CheckpointError(f"There are {len(steps)} steps for {len(found)} checkpoints. Give one for each.")
    first, last = sum(steps[:average]) / average, sum(steps[-average:]) / average
    if to is None:
        assert alpha is not None
        to = last + alpha * (last - first)
    weights = coefficients(steps, to, fit=fit, average=average)
    if not math.isfinite(to):
        raise CheckpointError("How far to go is no finite number.")
    return [path for _, path in found], weights, (to - last) / (last - first)
