"""The rule on a CPU, by a few C loops (`native.c`), compiled where the package is built if a compiler is there.

torch does in several operations what takes one pass here, and a sum that no number of threads may change in six.
Tensors are flat storage: all that matters is that param, anchor and drift estimate have the same dense layout.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .foreach import same_storage_order

DTYPES = {torch.float32, torch.bfloat16}
PART = 1 << 16  # elements that a thread takes at a time; fixed, since it sets the order of the sums
FOLDER = Path(__file__).parent  # where the compiled library lies
FUNCTIONS = ("extraopt_cycle_sums", "extraopt_plain_jump", "extraopt_retreat", "extraopt_trial", "extraopt_anchor")


def _truncated(file: Path) -> bool:
    """Whether an ELF file ends before its table of sections: the loader would kill the process instead of failing."""
    with file.open("rb") as f:
        header = f.read(64)
    if len(header) < 64 or header[:5] != b"\x7fELF\x02":
        return False  # no ELF file of 64 bits: the loader can tell
    order = "<" if header[5] == 1 else ">"
    (start,), (size, count) = struct.unpack_from(order + "Q", header, 40), struct.unpack_from(order + "HH", header, 58)
    return file.stat().st_size < int(start + size * count)


def _load(file: Path) -> ctypes.CDLL:
    """The library in `file`. Raises OSError where it can't be loaded, AttributeError where a function is missing."""
    if _truncated(file):
        raise OSError(f"{file}: file is truncated")
    library = ctypes.CDLL(str(file))
    for name in FUNCTIONS:
        getattr(library, name)
    return library


@functools.cache  # and so one warning
def _library() -> ctypes.CDLL | None:
    failures = []
    for file in sorted(FOLDER.glob("_native*.so")):
        try:
            return _load(file)
        except (OSError, AttributeError) as error:
            failures.append(f"{file} can't be used ({error})")
    if failures:
        warnings.warn(
            f"extraopt computes the ends of cycles on the CPU by slower torch operations: {'; '.join(failures)}. "
            "The file is of another platform or version, or damaged: install extraopt again on this machine, or delete "
            "the file to do without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return None


def supports(p: Tensor, a: Tensor, v: Tensor | None) -> bool:
    """Can the loops take a parameter, its anchor and its drift estimate? If not, the caller has another path."""
    return p.is_cpu and p.dtype in DTYPES and _library() is not None and same_storage_order(p, a, v)


@dataclass
class Work:
    """The tensors, and a list of them cut into parts: int64 [parts, 6], as `native.c` has it."""

    params: Sequence[Tensor]
    anchors: Sequence[Tensor]
    estimates: Sequence[Tensor] | None
    parts: Tensor


def prepare(params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None) -> Work:
    """What the operations take. It knows the tensors' addresses of now."""
    numels = torch.tensor(list(map(Tensor.numel, params)), dtype=torch.int64, device="cpu")
    sizes = torch.tensor([p.itemsize for p in params], dtype=torch.int64, device="cpu")
    counts = (numels + PART - 1) // PART
    index = torch.repeat_interleave(torch.arange(len(params), device="cpu"), counts)
    starts = (torch.arange(len(index), device="cpu") - (counts.cumsum(0) - counts)[index]) * PART
    addresses = [
        torch.tensor(list(map(Tensor.data_ptr, ts)), dtype=torch.int64, device="cpu")[index] + starts * sizes[index]
        if ts is not None
        else torch.zeros_like(index)
        for ts in (params, anchors, estimates)
    ]
    parts = torch.stack([*addresses, (numels[index] - starts).clamp(max=PART), sizes[index], index], 1)
    return Work(params, anchors, estimates, parts)


def cycle_sums(work: Work) -> Tensor:
    """The sums of `extraopt.kernels.TensorLists`. Products are added in float32 up to 1024, then in float64."""
    sums = torch.zeros(len(work.params), 4, dtype=torch.float64, device="cpu")
    partials = torch.zeros(len(work.parts), 4, dtype=torch.float64, device="cpu")
    _call("extraopt_cycle_sums", work, partials, sums)
    return sums


def jump_(work: Work, ratios: Tensor) -> None:
    """The jump of `extraopt.kernels.TensorLists`: float32, one rounding into each output, bit-equal to `foreach`."""
    _call("extraopt_plain_jump", work, ratios.float())
    _written(work.params, work.anchors)


def retreat_(work: Work, retreats: Tensor, weights: Tensor) -> None:
    """The retreat of `extraopt.kernels.TensorLists`, in the arithmetic of the jump."""
    _call("extraopt_retreat", work, torch.stack([retreats, weights], 1).float())
    _written(work.anchors, work.estimates or ())


def trial_(work: Work, ratios: Tensor) -> None:
    """The trial of `extraopt.kernels.TensorLists`, in the arithmetic of the jump."""
    _call("extraopt_trial", work, ratios.float())
    _written(work.params)


def anchor_(work: Work) -> None:
    """A <- E."""
    _call("extraopt_anchor", work)
    _written(work.anchors)


def _call(name: str, work: Work, *arguments: Tensor) -> None:
    given = [ctypes.c_void_p(x.data_ptr()) for x in arguments]
    numbers = ctypes.c_int64(len(work.parts)), ctypes.c_int64(torch.get_num_threads())
    getattr(_library(), name)(ctypes.c_void_p(work.parts.data_ptr()), *numbers, *given)


def _written(*lists: Sequence[Tensor]) -> None:
    """Tell autograd, which saw none of the writes: it would use what it saved as if it were still right."""
    for tensors in lists:
        torch.autograd.graph.increment_version(tensors)
