"""Write a checkpoint atomically, and its safetensors tensor by tensor."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from .read import DTYPES, Checkpoint
from .safety import CheckpointError

CAN_NOT_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM, errno.EBADF, errno.EISDIR}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@contextmanager
def new_folder(out: Path, inputs: Sequence[Path]) -> Iterator[Path]:
    """A folder beside `out` to fill, which becomes `out` at the end or goes away: an atomic write.

    Raises:
        CheckpointError: `out` is not empty, lies within an input, can't be replaced, or can't be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} is there and not empty. Give a new folder.")
    for folder in inputs:
        if out.resolve().is_relative_to(folder.resolve()):
            raise CheckpointError(f"{out} lies within the input {folder}, which stays as it is. Give another folder.")
    beside: Path | None = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent))
        _check_replaceable(out, beside)
        yield beside
        with suppress(PermissionError):  # network disks without permissions
            beside.chmod(0o777 & ~_umask())  # mkdtemp's folders are for their owner only
        for folder in (beside, *(path for path in beside.rglob("*") if path.is_dir())):
            fsync(folder)
        os.rename(beside, out)  # over an empty folder too; fails if someone filled it meanwhile
        fsync(out.parent)
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else error.strerror or str(error)
        raise CheckpointError(f"{out} can not be written: {reason}. Nothing was left there.") from error
    finally:
        if beside is not None:
            shutil.rmtree(beside, ignore_errors=True)


def _check_replaceable(out: Path, beside: Path) -> None:
    """Say before the work that an empty folder `out` can't be replaced: a mount point can't, a bind mount neither."""
    if not out.exists():
        return
    try:
        os.rename(out, beside / "old")
        os.rename(beside / "old", out)
    except OSError as error:
        raise CheckpointError(
            f"{out} can not be replaced ({error.strerror}): it is a mount point or in use. Give a new folder inside it."
        ) from error


def check_space(folder: Path, size: int) -> None:
    """Refuse to write more than a disk has room for, if it tells: some network disks say 0 of 0.

    Raises:
        OSError: As writing would raise it.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return
    if 0 < free < size:
        raise OSError(errno.ENOSPC, f"{size} bytes to write, {free} free")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def fsync(path: Path) -> None:
    """Have a file, or what a folder holds, on the disk before going on, where the disk can do that."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        if error.errno in CAN_NOT_SYNC and path.is_dir():
            return
        raise
    try:
        fsync_handle(handle)
    finally:
        os.close(handle)


def fsync_handle(handle: int) -> None:
    """`os.fsync`, where the disk can do that: CIFS and FUSE refuse it, for folders above all."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in CAN_NOT_SYNC:
            raise


def write_all(stream: BinaryIO, memory: bytes | bytearray) -> None:
    """Write all of `memory` to an unbuffered stream."""
    view = memoryview(memory)
    while view:  # a raw write may take a part only
        view = view[stream.write(view) :]


def write_header(stream: BinaryIO, layout: Checkpoint, names: list[str], metadata: dict[str, str]) -> None:
    """What a safetensors file begins with: https://huggingface.co/docs/safetensors/index#format."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    offset = 0
    for name in names:
        info = layout.infos[name]
        where = [offset, offset + info.nbytes]
        header[name] = {"dtype": NAMES[info.dtype], "shape": info.shape, "data_offsets": where}
        offset += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    write_all(stream, len(text).to_bytes(8, "little") + text)


def write_text(file: Path, text: str) -> None:
    """Write a small file, and have it on the disk."""
    file.write_text(text, encoding="utf-8")
    fsync(file)
