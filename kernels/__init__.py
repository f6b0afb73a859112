"""The arithmetic of a cycle's end over lists of tensors, by the fastest implementation each tensor allows.

`cycle_sums` reads (what the gate needs), `jump_` writes. Lists are local, detached tensors; complex ones are taken as
pairs of reals.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import foreach, native

_FUSED_DEVICES = {"cuda"}  # types of device whose tensors are offered to the fused kernel; AMD's are "cuda" to torch

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor] | None]


@functools.cache  # Python does not remember an import that failed
def _fused() -> ModuleType | None:
    """The Triton implementation, imported only when a tensor on a GPU asks for it; None where there is no Triton."""
    try:
        from . import multi_tensor
    except ImportError:
        return None
    return multi_tensor


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def _implementation(p: Tensor, a: Tensor, v: Tensor | None) -> ModuleType:
    if p.device.type in _FUSED_DEVICES and (fused := _fused()) and fused.supports(p, a, v):
        return fused
    return native if native.supports(p, a, v) else foreach


def _dispatch(
    params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None
) -> Iterator[tuple[ModuleType, list[int], _Lists]]:
    """Each implementation with the positions that it takes, all on one device, and its part of the three lists."""
    p, a, v = _real(params), _real(anchors), None if drifts is None else _real(drifts)
    positions: dict[tuple[ModuleType, torch.device], list[int]] = {}
    for i, t in enumerate(p):
        module = _implementation(t, a[i], None if v is None else v[i])
        positions.setdefault((module, t.device), []).append(i)
    for (module, _), indices in positions.items():
        yield module, indices, ([p[i] for i in indices], [a[i] for i in indices], v and [v[i] for i in indices])


def cycle_sums(params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None) -> Tensor:
    """What the gate needs to know of each tensor. Reads only.

    Args:
        params: E, T floating or complex tensors, any mix of shapes, layouts, dtypes and devices.
        anchors: A, of the same shapes, dtypes and devices.
        drifts: V, likewise; None (columns 0 and 2 are then 0) where the rule keeps no estimate.

    Returns:
        float64 [T, 4] on the CPU: <D, V>, <D, D>, <V, V>, <E, E> with D = E - A; not finite where an input is not.

    Waits for the device: this is the one place where a cycle's end needs host values.
    """
    sums = torch.zeros(len(params), 4, dtype=torch.float64)
    for module, indices, lists in _dispatch(params, anchors, drifts):
        sums[indices] = module.cycle_sums(*lists).cpu()
    return sums


def jump_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    drifts: Sequence[Tensor] | None,
    ratios: Sequence[float],
    retreats: Sequence[float],
    weight: float,
) -> None:
    """V <- lerp(V, D, weight), P <- P + ratio * V - retreat * D, A <- P for every tensor, in place, with D = P - A.

    Args:
        params, anchors, drifts: as in `cycle_sums`, all values finite; without drifts V = D, and none is kept.
        ratios: g * N / k, one for each tensor.
        retreats: part of the drift that is taken back, one for each tensor; with ratio 0 and retreat 0 its weights are
            left as they are, bit for bit.
        weight: 1 - extra_beta.
    """
    for module, indices, lists in _dispatch(params, anchors, drifts):
        module.jump_(*lists, [ratios[i] for i in indices], [retreats[i] for i in indices], weight)
