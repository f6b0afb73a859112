"""Find the checkpoints of a run, and their steps, in the folders that trainers leave."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from .read import open_checkpoint, weights_in
from .safety import CheckpointError, read_text

# Where trainers put what is loaded, in the folder of a step: verl in actor/, by its own merger or for an adapter.
INSIDE = (".", "actor/huggingface", "huggingface", "actor/lora_adapter", "lora_adapter", "actor", "policy")
# A step at the end of a name: checkpoint-100, global_step_100, iter_0000100, 100; and OpenRLHF's global_step10_hf.
STEP = re.compile(r"(|.*[-_]|.*(?:step|iter|iteration|checkpoint|ckpt|epoch))(\d+)(|[-_]hf)")
UNFINISHED = re.compile(
    r"(?:\.|tmp|temp|incomplete|partial)[-_.]?(.+)|(.+)[-_.](?:tmp|temp|incomplete|partial|unfinished)"
)
FINISHED = "latest_checkpointed_iteration.txt"
RUN_OF_DAY = re.compile(r"v\d+-\d+-\d+")  # ms-swift's folder of a run in the output's


def find_checkpoints(path: str | Path, notes: list[str] | None = None) -> list[tuple[int, Path]]:
    """The checkpoints of a run, or a single one.

    Args:
        path: A folder of checkpoints named by their steps (`checkpoint-100`, `global_step_100`, `100`, ...), as TRL,
            verl, OpenRLHF and ms-swift leave them, or the folder of one checkpoint. A Trainer's output folder, which is
            both, counts as a run. Links to a checkpoint beside it (`last`, `best`) count as that one.
        notes: What is left out because it was not finished is told here.

    Returns:
        (step, folder), by step. The step of a single checkpoint without a number at the end of its name is 0.

    Raises:
        CheckpointError: There is no checkpoint, or there are those of several runs.
    """
    path = Path(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path} is no folder. Give the folder of a checkpoint or of a run.")
    runs = _runs(path, notes)
    if not runs and weights_in(path) is None:
        inner = [folder for folder in sorted(path.iterdir()) if RUN_OF_DAY.fullmatch(folder.name) and folder.is_dir()]
        found_in = {folder: found for folder in inner if (found := _runs(folder, notes))}
        if len(found_in) > 1:
            names = ", ".join(folder.name for folder in found_in)
            raise CheckpointError(f"{path} holds several runs ({names}). Give the folder of one.")
        for found in found_in.values():
            runs = found
    if len(runs) > 1:
        names = ", ".join(f"{prefix}*" for prefix in sorted(runs))
        raise CheckpointError(f"{path} holds several runs ({names}). Give the folders one by one.")
    if runs:
        (checkpoints,) = runs.values()
        return sorted(checkpoints)
    return [(split_step(path)[1] or 0, single(path))]


def _runs(path: Path, notes: list[str] | None) -> dict[str, list[tuple[int, Path]]]:
    """(step, folder) of all checkpoints in a folder, by what is before the step in their names."""
    real: dict[str, Path] = {}
    for folder in sorted(path.iterdir(), key=lambda folder: (folder.is_symlink(), folder.name)):
        real.setdefault(os.path.realpath(folder), folder)  # links come last: one folder counts once, by its own name
    runs: dict[str, list[tuple[int, Path]]] = {}
    finished = _finished(path)
    for folder in real.values():
        prefix, step = split_step(folder)
        inside = next((folder / name for name in INSIDE if weights_in(folder / name)), None)
        rest = UNFINISHED.fullmatch(folder.name)
        if rest and split_step(Path(rest[1] or rest[2]))[1] is not None:
            if os.path.isdir(folder) and notes is not None:
                notes.append(f"{folder} was left out: by its name it is not finished.")
        elif step is not None and finished is not None and step > finished:
            if notes is not None:
                notes.append(f"{folder} was left out: {FINISHED} says that step {finished} is the last one finished.")
        elif step is not None and inside:
            runs.setdefault(prefix, []).append((step, inside))
    return runs


def _finished(path: Path) -> int | None:
    """The last step that verl or Megatron finished saving, where they say so."""
    try:
        return int(read_text(path / FINISHED)[:20])
    except (OSError, ValueError):
        return None


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
    match = STEP.fullmatch(name)
    return (match[1], int(match[2])) if match else (folder.name, None)


def numbered(checkpoints: Sequence[str | Path], notes: list[str] | None = None) -> list[tuple[int | None, Path]]:
    """Checkpoints with their steps, where they are those of one run: a single folder of a run, or some of its folders.

    Args:
        checkpoints: Folders. Several are taken as they are, a single one stands for all checkpoints in it.
        notes: As in `find_checkpoints`.

    Returns:
        (step, folder) in the order given; the steps are None where the names don't number checkpoints of one run.

    Raises:
        CheckpointError: One of them is no checkpoint.
    """
    if len(checkpoints) == 1:
        return [*find_checkpoints(checkpoints[0], notes)]
    paths = [Path(path) for path in checkpoints]
    runs = {(os.path.dirname(os.path.realpath(path)), split_step(path)[0]) for path in paths}
    return [(split_step(path)[1] if len(runs) == 1 else None, single(path)) for path in paths]
