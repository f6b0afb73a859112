"""The arithmetic of a cycle's end over lists of tensors, by the fastest implementation each tensor allows.

`cycle_sums` reads (what the gate needs), `jump_` writes. Lists are local, detached tensors; complex ones are taken as
pairs of reals.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import foreach


def _fused() -> ModuleType | None:
    """The Triton implementation, imported only when a list on a GPU asks for it."""
    try:
        from . import multi_tensor
    except ImportError:
        return None
    return multi_tensor


def _partition(
    params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None
) -> list[tuple[ModuleType, list[int]]]:
    """Which implementation takes which positions: one list per implementation and device."""
    lists: dict[tuple[ModuleType, torch.device], list[int]] = {}
    for i, p in enumerate(params):
        fused = _fused() if p.is_cuda else None
        takes = fused is not None and fused.supports(p, anchors[i], None if drifts is None else drifts[i])
        lists.setdefault((fused if takes and fused else foreach, p.device), []).append(i)
    return [(module, indices) for (module, _), indices in lists.items()]


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


def cycle_sums(params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None) -> Tensor:
    """<D, V>, <D, D>, <V, V> and <E, E> of each tensor, with D = E - A: float64 [T, 4] on the CPU.

    Args:
        params: E, T floating or complex tensors, any mix of shapes, layouts, dtypes and devices.
        anchors: A, of the same shapes, dtypes and devices.
        drifts: V, likewise; None (columns 0 and 2 are then 0) where the rule keeps no estimate.

    Waits for the device: this is the one place where a cycle's end needs host values.
    """
    sums = torch.zeros(len(params), 4, dtype=torch.float64)
    p, a, v = _real(params), _real(anchors), None if drifts is None else _real(drifts)
    for module, indices in _partition(p, a, v):
        lists = [p[i] for i in indices], [a[i] for i in indices], None if v is None else [v[i] for i in indices]
        sums[indices] = module.cycle_sums(*lists).cpu()
    return sums


def jump_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    drifts: Sequence[Tensor] | None,
    ratios: Sequence[float],
    weight: float,
) -> None:
    """V <- lerp(V, D, weight), P <- P + ratio * V, A <- P for every tensor, in place, with D = P - A.

    Args:
        params, anchors, drifts: as in `cycle_sums`; all values finite.
        ratios: g * N / k, one for each tensor; 0 leaves its weights bit for bit.
        weight: 1 - extra_beta.
    """
    p, a, v = _real(params), _real(anchors), None if drifts is None else _real(drifts)
    for module, indices in _partition(p, a, v):
        lists = [p[i] for i in indices], [a[i] for i in indices], None if v is None else [v[i] for i in indices]
        module.jump_(*lists, [ratios[i] for i in indices], weight)
