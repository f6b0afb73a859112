"""Whether a jump made things worse: the metric that a user reports, over the cycle before a jump and since."""

from __future__ import annotations

import math
from typing import Any

import torch

from .state import is_number

Window = tuple[float, float, float]
"""Count, mean and sum of squared deviations of the values reported in a stretch of training."""

EMPTY: Window = (0.0, 0.0, 0.0)
FEWEST = 3  # values on either side of a jump without which nothing is said
SIGNIFICANT = 3.0  # standard errors; of pure noise, 10 values in a cycle, they take one jump in 67 back
SHRINK, GROW = 0.5, 1.1  # the horizon after a jump that was rolled back, and for each cycle that was not


def add_report_entries(group: dict[str, Any]) -> None:
    """Give a group of parameters what `report` keeps in it, where it has none.

    From the start: torch.distributed.checkpoint reads only what a fresh optimizer has.

    Raises:
        ValueError: what a loaded group has is not that.
    """
    scale, reports = group.setdefault("extra_scale", 1.0), group.setdefault("extra_reports", EMPTY + EMPTY)
    if not is_number(scale, 0) or scale > 1:
        raise ValueError(f"Invalid extra_scale: {scale!r:.80}. It must be a number in [0, 1].")
    floats = isinstance(reports, (tuple, list)) and all(isinstance(x, (int, float)) for x in reports)
    if not floats or len(reports) != 6 or any(reports[i] < 0 for i in (0, 2, 3, 5)):  # counts and squares
        raise ValueError(f"Invalid extra_reports: {reports!r:.80}. They must be two windows of three numbers.")


def add(window: Window, value: float) -> Window:
    """The window with one more value (Welford's update)."""
    n, mean, squares = window
    away = value - mean
    mean += away / (n + 1)
    return n + 1, mean, squares + away * (value - mean)


def worse(before: Window, after: Window) -> bool:
    """Whether the mean fell by more than `SIGNIFICANT` standard errors, by the variance that both windows share."""
    (n, mean, squares), (m, later, more) = before, after
    if min(n, m) < FEWEST:
        return False
    variance = (squares + more) / (n + m - 2)
    return later < mean - SIGNIFICANT * math.sqrt(variance * (1 / n + 1 / m))


def mean_over_ranks(value: float, device: torch.device) -> float:
    """The mean of `value` over the ranks of torch.distributed, all of which must call; `value` without it."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return float(value)
    mean = torch.tensor(float(value), dtype=torch.float32, device=device)
    torch.distributed.all_reduce(mean)
    return float(mean) / torch.distributed.get_world_size()
