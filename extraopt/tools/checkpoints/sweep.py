"""Extrapolate by several alphas, and score each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .extrapolate import extrapolate
from .find import numbered
from .read import open_checkpoint
from .safety import CheckpointError
from .write import write_text


@dataclass
class Sweep:
    """A sweep over alpha.

    Attributes:
        rows: Alpha, folder and score of each model; alpha 0 is the last checkpoint itself. No scores without an
            evaluation.
        best: The row with the highest score.
    """

    rows: list[dict[str, Any]]
    best: dict[str, Any] | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def sweep(
    checkpoints: Sequence[str | Path],
    out: str | Path,
    alphas: Sequence[float],
    evaluate: Callable[[Path], float] | None = None,
    **options: Any,
) -> Sweep:
    """Extrapolate by several alphas, into `out/alpha-1`, `out/alpha-2`, ..., and score each.

    Args:
        checkpoints: As for `extrapolate`.
        out: New folder.
        alphas: How far.
        evaluate: Score of the model in a folder, higher is better; called for the last checkpoint too.
        options: Of `extrapolate`.

    Returns:
        Scores, by alpha. Also written to `out/sweep.json`.

    Raises:
        CheckpointError: As `extrapolate`; models written before it stay.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and not empty. Give a new folder.")
    rows: list[dict[str, Any]] = []
    if evaluate:
        last = numbered(checkpoints)[-1][1]
        open_checkpoint(last)
        rows.append({"alpha": 0.0, "dir": str(last), "score": float(evaluate(last))})
    for alpha in sorted(set(alphas)):
        folder = extrapolate(checkpoints, out / f"alpha-{alpha:g}", alpha=alpha, **options).out
        rows.append({"alpha": alpha, "dir": str(folder), "score": float(evaluate(folder)) if evaluate else None})
    best = max(rows, key=lambda row: row["score"]) if evaluate else None
    result = Sweep(rows, best)
    write_text(out / "sweep.json", json.dumps(result.as_dict(), indent=1) + "\n")
    return result
