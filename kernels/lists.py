"""Lists of tensors at the end of a cycle, each tensor given to the fastest implementation that can take it."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from operator import eq, is_
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from . import foreach, native, streamed

FUSED_DEVICES = {"cuda"}  # types of device whose tensors are offered to the fused kernel; AMD's are "cuda" to torch
Factors = Tensor | Sequence[float]


@functools.cache  # Python does not remember an import that failed
def _fused() -> ModuleType | None:
    """The Triton implementation, imported only when a tensor on a GPU asks for it; None where there is no Triton."""
    try:
        from . import multi_tensor
    except ImportError:
        return None
    return multi_tensor


def _implementation(p: Tensor, a: Tensor, v: Tensor | None) -> ModuleType:
    if a.device != p.device:
        return streamed
    if p.device.type in FUSED_DEVICES and (fused := _fused()) and fused.supports(p, a, v):
        return fused
    return native if native.supports(p, a, v) else foreach


def _facts(tensors: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    """What a table of these tensors rests on; `map` and `zip` over what is C make it cheap.

    An address tells the device, and a shape the strides of a contiguous tensor: `_more` is for all others.
    """
    dtype, shape = Tensor.dtype.__get__, Tensor.shape.__get__  # type: ignore[attr-defined]
    return zip(*(map(get, tensors) for get in (Tensor.data_ptr, dtype, shape, Tensor.is_contiguous)))


def _more(t: Tensor) -> tuple[Any, ...]:
    return t.device, t.stride()


def _real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(t) if t.is_complex() else t for t in tensors]


class TensorLists:
    """Weights, anchors and drift estimates at the end of a cycle, sorted by who computes on them.

    It knows where the tensors lay in memory when it was made, and may be kept and used for as long as `still_fits`.

    Args:
        params: E, T floating or complex tensors (local, no DTensors), any mix of shapes, layouts, dtypes and devices;
            complex ones are taken as pairs of reals.
        anchors: A, of the same shapes and dtypes, on the same devices or in host memory.
        estimates: V, likewise; None where the rule keeps no estimate.

    The operations work in place, in the order of the call, and must be called under `torch.no_grad()`. Arithmetic is
    float32 (float64 for float64 and complex128), each product and sum fused, with one rounding into each output.
    Factors are one finite float for each tensor, as float64 [T] on the CPU or any sequence.
    """

    def __init__(self, params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None) -> None:
        self._lists = lists = [list(ts) for ts in (params, anchors, estimates) if ts is not None]
        self._facts: list[list[tuple[Any, ...]]] | None = None
        if all(type(t) in foreach.PLAIN and t.layout is torch.strided for ts in lists for t in ts):
            self._facts = [list(_facts(ts)) for ts in lists]
            every = ((j, i, t) for j, ts in enumerate(lists) for i, t in enumerate(ts))
            self._more = [(j, i, _more(t)) for j, i, t in every if not t.data_ptr() or not t.is_contiguous()]
        if any(map(Tensor.is_complex, params)):
            lists = list(map(_real, lists))
        groups: dict[tuple[ModuleType, torch.device], list[int]] = {}
        for i, tensors in enumerate(zip(*lists)):
            p, a, v = tensors if len(tensors) == 3 else (*tensors, None)
            groups.setdefault((_implementation(p, a, v), p.device), []).append(i)
        # for each: module, indices in the lists (everything: a slice, which copies nothing), what the module tabulated
        self.work: list[tuple[ModuleType, Tensor | slice, Any]] = []
        for (module, _), places in groups.items():
            own = [[ts[i] for i in places] for ts in lists] + [None] * (estimates is None)
            work = module.prepare(*own, *[TensorLists] * (module is streamed))
            self.work.append((module, slice(None) if len(groups) == 1 else torch.tensor(places, device="cpu"), work))

    def still_fits(
        self, params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None
    ) -> bool:
        """Whether a new `TensorLists` of these would be no other: same addresses, shapes, strides, dtypes, devices.

        Costs a microsecond a tensor. False for subclasses of Tensor, whose elements may lie anywhere.
        """
        given = [ts for ts in (params, anchors, estimates) if ts is not None]
        if self._facts is None or list(map(len, given)) != list(map(len, self._lists)):
            return False
        # the same elements by way of other objects: then those kept here must be as they were, too
        same = all(all(map(is_, ts, own)) for ts, own in zip(given, self._lists))
        if not same and not all(type(t) in foreach.PLAIN for ts in given for t in ts):
            return False
        checked: list[Sequence[Sequence[Tensor]]] = [given] if same else [given, self._lists]
        return all(
            all(all(map(eq, _facts(ts), facts)) for ts, facts in zip(lists, self._facts))
            and all(_more(lists[j][i]) == more for j, i, more in self._more)
            for lists in checked
        )

    def sums(self, device: torch.device | str = "cpu") -> Tensor:
        """What the gate needs to know of each tensor. Reads only.

        Returns:
            float64 [T, 4] on `device`: <D, V>, <D, D>, <V, V>, <E, E> with D = E - A; not finite where an input is not;
            without estimates columns 0 and 2 are 0.

        On the CPU it waits for the device: this is the one place where a cycle's end needs host values.
        """
        sums = torch.zeros(len(self._lists[0]), 4, dtype=torch.float64, device=device)
        for module, index, work in self.work:
            sums[index] = module.cycle_sums(work).to(device)
        return sums

    def jump_(self, ratios: Factors) -> None:
        """E <- E + ratio * D, A <- E with D = E - A: the paper's rule, which keeps no estimates.

        All values must be finite.

        Args:
            ratios: how much of its drift each tensor jumps; 0 leaves the weights as they are, bit for bit.

        Raises:
            ValueError: there are estimates, or not as many factors as tensors.
        """
        if len(self._lists) == 3:
            raise ValueError("this operation takes no drift estimates: TensorLists was made with some")
        own_ratios = self._column(ratios)
        for module, index, work in self.work:
            module.jump_(work, own_ratios[index])

    def retreat_(self, retreats: Factors, weights: Factors) -> None:
        """V <- lerp(V, D, weight), A <- E - retreat * D with D = E - A. Does not write E.

        All values must be finite.

        Args:
            retreats: part of the drift that the anchor stays behind; 0: A <- E, bit for bit.
            weights: of the new drift in the estimate.

        Raises:
            ValueError: there are no estimates, or not as many factors as tensors.
        """
        self._need_estimates()
        own_retreats, own_weights = self._column(retreats), self._column(weights)
        for module, index, work in self.work:
            module.retreat_(work, own_retreats[index], own_weights[index])

    def trial_(self, ratios: Factors) -> None:
        """E <- A + ratio * V. Writes only E, so that the next trial, with other ratios, knows nothing of this one.

        Args:
            ratios: how much of the estimate each tensor is from its anchor; 0: E <- A, bit for bit.

        Raises:
            ValueError: there are no estimates, or not as many factors as tensors.
        """
        self._need_estimates()
        own_ratios = self._column(ratios)
        for module, index, work in self.work:
            module.trial_(work, own_ratios[index])

    def anchor_(self) -> None:
        """A <- E, bit for bit. Writes only A."""
        for module, _, work in self.work:
            module.anchor_(work)

    def _need_estimates(self) -> None:
        if len(self._lists) == 2:
            raise ValueError("this operation needs drift estimates: TensorLists was made without")

    def _column(self, factors: Factors) -> Tensor:
        """Factors as contiguous float64 [T] on the CPU: C and Triton read them by address."""
        column = torch.as_tensor(factors, dtype=torch.float64, device="cpu").contiguous()
        if column.shape != (len(self._lists[0]),):
            raise ValueError(f"{len(self._lists[0])} tensors need as many factors, got shape {tuple(column.shape)}")
        return column
