"""The arithmetic of a cycle's end over lists of tensors, by the fastest implementation each tensor allows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import foreach, native

_FUSED_DEVICES = {"cuda"}  # types of device whose tensors are offered to the fused kernel; AMD's are "cuda" to torch


@functools.cache  # Python does not remember an import that failed
def _fused() -> ModuleType | None:
    """The Triton implementation, imported only when a tensor on a GPU asks for it; None where there is no Triton."""
    try:
        from . import multi_tensor
    except ImportError:
        return None
    return multi_tensor


def _implementation(p: Tensor, a: Tensor, v: Tensor | None) -> ModuleType:
    if p.device.type in _FUSED_DEVICES and (fused := _fused()) and fused.supports(p, a, v):
        return fused
    return native if native.supports(p, a, v) else foreach


class Lists:
    """Weights, anchors and drift estimates at the end of a cycle, sorted by who computes on them.

    To be used at once: it knows where the tensors lie in memory now.

    Args:
        params: E, T floating or complex tensors (local, no DTensors), any mix of shapes, layouts, dtypes and devices;
            complex ones are taken as pairs of reals.
        anchors: A, of the same shapes and dtypes, on the same devices or in host memory.
        drifts: V, likewise; None where the rule keeps no estimate.
    """

    def __init__(self, params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None) -> None:
        lists = [params, anchors] if drifts is None else [params, anchors, drifts]
        if any(map(Tensor.is_complex, params)):
            lists = [[torch.view_as_real(t) if t.is_complex() else t for t in ts] for ts in lists]
        self._count = len(params)
        from . import streamed  # which uses this class

        groups: dict[tuple[ModuleType, torch.device], list[int]] = {}
        for i, tensors in enumerate(zip(*lists)):
            p, a, v = tensors if len(tensors) == 3 else (*tensors, None)
            module = _implementation(p, a, v) if a.device == p.device else streamed
            groups.setdefault((module, p.device), []).append(i)
        self.work: list[tuple[ModuleType, list[int], Any]] = []  # module, places in the lists, what it needs to know
        for (module, _), places in groups.items():
            own = [[ts[i] for i in places] for ts in lists] + [None] * (drifts is None)
            self.work.append((module, places, module.prepare(*own)))

    def sums(self) -> Tensor:
        """What the gate needs to know of each tensor. Reads only.

        Returns:
            float64 [T, 4] on the CPU: <D, V>, <D, D>, <V, V>, <E, E> with D = E - A; not finite where an input is not;
            without drifts columns 0 and 2 are 0.

        Waits for the device: this is the one place where a cycle's end needs host values.
        """
        sums = torch.zeros(self._count, 4, dtype=torch.float64)
        for module, places, work in self.work:
            sums[places] = module.cycle_sums(work).cpu()
        return sums

    def jump_(self, ratios: Sequence[float], retreats: Sequence[float], weight: float) -> None:
        """V <- lerp(V, D, weight), E <- E + ratio * V - retreat * D, A <- E for every tensor, in place, with D = E - A.

        All values must be finite. Without drifts V = D, and none is kept.

        Args:
            ratios: g * H / k, one for each tensor.
            retreats: part of the drift that is taken back, one for each tensor; with ratio 0 and retreat 0 its weights
                are left as they are, bit for bit.
            weight: 1 - extra_beta.
        """
        for module, places, work in self.work:
            module.jump_(work, [ratios[i] for i in places], [retreats[i] for i in places], weight)
