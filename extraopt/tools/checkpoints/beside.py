"""What lies beside a model's weights: which files belong to the model, and which to the run that made it."""

from __future__ import annotations

import json
import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

from .safety import CheckpointError, check_inside, read_text

WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".gguf",
    ".npz",
    ".distcp",
    ".ot",
)
# A trainer's own: true of the run, and of no other weights.
OF_RUN = (
    "*.index.json", "trainer_state.json", "training_args*", "optimizer*", "scheduler*", "rng_state*", "scaler*",
    "random_states*", "zero_to_fp32.py", "latest", "latest_checkpointed_iteration.txt", "events.out.tfevents*", "*.log",
    "log.jsonl", "logging.jsonl", "all_results.json", "train_results.json", "eval_results.json", "*.lock", "*.tmp",
)  # fmt: skip
FOLDERS_OF_RUN = re.compile(
    r"runs|wandb|logs?|tensorboard|mlruns|__pycache__|.*[-_.]?(checkpoint|step|iter|epoch)[-_]?\d+.*|\d+"
)


def files_beside(folder: Path) -> tuple[Path, ...]:
    """Files of a model but for its weights, its parts in folders of their own (`1_Pooling/`) included.

    Weights count where they are those of such a part, which `modules.json` of sentence-transformers names: without
    them the model does not load.

    Raises:
        CheckpointError: One of them is a link that leads elsewhere.
    """
    parts = _parts(folder)
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        inner = Path(place)
        kept = [name for name in sorted(folders) if not name.startswith(".") and not FOLDERS_OF_RUN.fullmatch(name)]
        folders[:] = [name for name in kept if inner != folder or name in parts or not _of_weights(inner / name)]
        for name in sorted(names):
            file = inner / name
            of_part = inner != folder and inner.relative_to(folder).parts[0] in parts
            if name.startswith(".") or not os.path.isfile(file) or (is_weights(file) and not of_part):
                continue
            if not any(fnmatchcase(name, pattern) for pattern in OF_RUN):
                check_inside(file, folder)
                found.append(file)
    return tuple(found)


def is_weights(file: Path) -> bool:
    """Whether a file holds weights, by its name."""
    return file.suffix in WEIGHTS


def _of_weights(folder: Path) -> bool:
    """Whether a folder holds weights of its own: another model, another format of this one, or a state of the run."""
    return any(is_weights(Path(name)) for _, _, names in os.walk(folder) for name in names)


def _parts(folder: Path) -> set[str]:
    """Folders of the parts that sentence-transformers puts behind a model."""
    try:
        modules = json.loads(read_text(folder / "modules.json"))
        return {str(module["path"]).split("/")[0] for module in modules if module["path"]}
    except (OSError, ValueError, TypeError, KeyError, RecursionError, CheckpointError):
        return set()
