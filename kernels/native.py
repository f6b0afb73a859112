"""The rule on a CPU, by a few C loops (`native.c`), compiled where the package is built if a compiler is there.

torch does in five operations what takes one pass here, and a sum that no number of threads may change in six. Tensors
are flat storage: all that matters is that param, anchor and drift have the same dense layout.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .foreach import same_storage_order

DTYPES = {torch.float32, torch.bfloat16}
PART = 1 << 16  # elements that a thread takes at a time; fixed, since it sets the order of the sums


@functools.cache
def _library() -> ctypes.CDLL | None:
    for file in sorted(Path(__file__).parent.glob("_native*.so")):
        return ctypes.CDLL(str(file))
    return None


def supports(p: Tensor, a: Tensor, v: Tensor | None) -> bool:
    """Can the loops take a parameter, its anchor and its drift estimate? If not, the caller has another path."""
    return p.is_cpu and p.dtype in DTYPES and _library() is not None and same_storage_order(p, a, v)


@dataclass
class Work:
    """The tensors, and a list of them cut into parts: int64 [parts, 6], as `native.c` has it."""

    params: Sequence[Tensor]
    anchors: Sequence[Tensor]
    drifts: Sequence[Tensor] | None
    parts: Tensor


def prepare(params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None) -> Work:
    """What `cycle_sums` and `jump_` take."""
    numels = torch.tensor([p.numel() for p in params], dtype=torch.int64)
    sizes = torch.tensor([p.itemsize for p in params], dtype=torch.int64)
    counts = (numels + PART - 1) // PART
    places = torch.repeat_interleave(torch.arange(len(params)), counts)
    starts = (torch.arange(len(places)) - (counts.cumsum(0) - counts)[places]) * PART
    addresses = [
        torch.tensor([t.data_ptr() for t in ts], dtype=torch.int64)[places] + starts * sizes[places]
        if ts is not None
        else torch.zeros_like(places)
        for ts in (params, anchors, drifts)
    ]
    parts = torch.stack([*addresses, (numels[places] - starts).clamp(max=PART), sizes[places], places], 1)
    return Work(params, anchors, drifts, parts)


def cycle_sums(work: Work) -> Tensor:
    """The sums of `extraopt.kernels.Lists`. Products are added in float32 up to 1024 of them, then in float64."""
    sums = torch.zeros(len(work.params), 4, dtype=torch.float64)
    partials = torch.zeros(len(work.parts), 4, dtype=torch.float64)
    _call("extraopt_cycle_sums", work.parts, partials, sums)
    return sums


def jump_(work: Work, ratios: Sequence[float], retreats: Sequence[float], weight: float) -> None:
    """The jump of `extraopt.kernels.Lists`: float32, one rounding into each output, bit-equal to `foreach.jump_`."""
    factors = torch.tensor([ratios, retreats], dtype=torch.float32).T.contiguous()
    _call("extraopt_jump", work.parts, factors, ctypes.c_float(weight))
    # torch saw none of these writes: without this, autograd would use what it saved as if it were still right
    for written in (work.params, work.anchors, work.drifts or ()):
        torch.autograd.graph.increment_version(written)


def _call(name: str, parts: Tensor, *arguments: Tensor | ctypes.c_float) -> None:
    given = [ctypes.c_void_p(x.data_ptr()) if isinstance(x, Tensor) else x for x in arguments]
    threads = ctypes.c_int64(torch.get_num_threads())
    getattr(_library(), name)(ctypes.c_void_p(parts.data_ptr()), ctypes.c_int64(len(parts)), *given, threads)
