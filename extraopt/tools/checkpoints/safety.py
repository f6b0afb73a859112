"""What must hold of files that others wrote, before their content is used: sizes, kinds, and where links lead."""

from __future__ import annotations

import json
import os
import re
import zipfile
from pathlib import Path
from typing import Any

LARGEST_TEXT = 2**28  # bytes of a config, an index or prompts
LARGEST_PICKLE = 2**28  # bytes of the table of contents of a `.bin`
LARGEST_SHAPE = 2**53  # elements of a tensor


class CheckpointError(ValueError):
    """What is wrong with a checkpoint, where, and what to do about it: always one line."""

    def __init__(self, message: str):
        words = " ".join(message.split())
        super().__init__(words if len(words) <= 2000 else f"{words[:1000]} ... {words[-1000:]}")


def read_text(file: Path) -> str:
    """What a file of text holds, if it is one (a pipe might never end) and of a size to be read whole.

    Raises:
        OSError, ValueError: It can't be read.
    """
    if not os.path.isfile(file):  # Path.is_file raises where a name is too long
        raise FileNotFoundError("there is no such file")
    if (size := file.stat().st_size) > LARGEST_TEXT:
        raise OSError(f"its {size:,} bytes are too many")
    return file.read_text(encoding="utf-8")


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        CheckpointError: There is no such file, or something else is in it.
    """
    try:
        content = json.loads(read_text(file))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} can not be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object.")
    return content


def check_records(file: Path) -> None:
    """Refuse a file of torch.save that would take more memory than it takes of the disk.

    Raises:
        CheckpointError: It is compressed, or its table of contents is too large.
    """
    with zipfile.ZipFile(file) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED:
                raise CheckpointError(f"{file} is compressed, which torch.save never does. Refused.")
            if record.filename.endswith("data.pkl") and record.file_size > LARGEST_PICKLE:
                raise CheckpointError(f"{file} has a table of contents of {record.file_size} bytes. Refused.")


def check_inside(file: Path, folder: Path) -> None:
    """Refuse links that lead out of a checkpoint's folder, but for those by which the Hugging Face cache stores blobs.

    Raises:
        CheckpointError: `file` is such a link.
    """
    home = Path(os.path.realpath(folder))  # resolve() raises where links lead round
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    target = Path(os.path.realpath(file))
    if not any(target.is_relative_to(home) for home in homes):
        raise CheckpointError(f"{file} is a link to {target}, outside its folder. Refused: put a copy in its place.")


def check_size(config: Any, most: int) -> None:
    """Refuse to build a model of more layers or experts than there could be weights for: it would take for ever."""
    for key, value in config.items() if isinstance(config, dict) else ():
        check_size(value, most)
        if isinstance(value, (int, float)) and value > most and re.search("layer|expert|block|depth", key):
            raise ValueError(f"the config says {key}: {value:.6g}, and there are not so many tensors")
