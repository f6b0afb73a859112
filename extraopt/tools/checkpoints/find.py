"""Find the checkpoints of a run, and their steps, in the folders that trainers leave."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .read import open_checkpoint, weights_in
from .safety import CheckpointError

INSIDE = (".", "actor/huggingface", "huggingface", "actor")  # of global_step_*: where verl puts Hugging Face folders


def find_checkpoints(path: str | Path) -> list[tuple[int, Path]]:
    """The checkpoints of a run, or a single one.

    Args:
        path: A folder of checkpoints named by their steps (`checkpoint-100`, `global_step_100`, `100`, ...), or the
            folder of one checkpoint. A Trainer's output folder, which is both, counts as a run.

    Returns:
        (step, folder), by step. The step of a single checkpoint without a number at the end of its name is 0.

    Raises:
        CheckpointError: There is no checkpoint, or there are those of several runs.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is no folder. Give the folder of a checkpoint or of a run.")
    runs: dict[str, list[tuple[int, Path]]] = {}
    for folder in path.iterdir():
        prefix, step = split_step(folder)
        inside = next((folder / name for name in INSIDE if weights_in(folder / name)), None)
        if step is not None and inside:
            runs.setdefault(prefix, []).append((step, inside))
    if len(runs) > 1:
        names = ", ".join(f"{prefix}*" for prefix in sorted(runs))
        raise CheckpointError(f"{path} holds several runs ({names}). Give the folders one by one.")
    if runs:
        (found,) = runs.values()
        return sorted(found)
    return [(split_step(path)[1] or 0, single(path))]


def single(path: Path) -> Path:
    """The folder of the one checkpoint at `path`, which may lie a little deeper.

    Raises:
        CheckpointError: There is none.
    """
    inside = next((path / name for name in INSIDE if weights_in(path / name)), path)
    if weights_in(inside) is None:
        open_checkpoint(inside)  # raises with what is wrong
    return inside


def split_step(folder: Path) -> tuple[str, int | None]:
    """`runs/x/checkpoint-100` is ("checkpoint-", 100); a number that is part of a word, as in `Qwen3`, is no step."""
    name = os.path.basename(os.path.realpath(folder))  # Path.resolve raises where links lead round
    match = re.fullmatch(r"(|.*[-_])(\d+)", name)
    return (match[1], int(match[2])) if match else (folder.name, None)


def numbered(checkpoints: Sequence[str | Path]) -> list[tuple[int | None, Path]]:
    """Checkpoints with their steps, where they are those of one run: a single folder of a run, or some of its folders.

    Args:
        checkpoints: Folders. Several are taken as they are, a single one stands for all checkpoints in it.

    Returns:
        (step, folder) in the order given; the steps are None where the names don't number checkpoints of one run.

    Raises:
        CheckpointError: One of them is no checkpoint.
    """
    if len(checkpoints) == 1:
        return [*find_checkpoints(checkpoints[0])]
    paths = [Path(path) for path in checkpoints]
    runs = {(os.path.dirname(os.path.realpath(path)), split_step(path)[0]) for path in paths}
    return [(split_step(path)[1] if len(runs) == 1 else None, single(path)) for path in paths]
