"""The rule where anchors and estimates lie in host memory: they pass through two small buffers on the device.

While one batch is computed on, the next is on its way in and, in a jump or retreat, the one before it on its way out.
So sums and trials take what the bus needs for both lists once, jump and retreat twice, and the device holds 128 MiB of
them at most (more only for a tensor with gaps in its storage, which can't be cut). From pinned memory nothing waits;
from any other the copies wait for each other and the results are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from . import foreach

Batch = list[tuple[int, Sequence[Tensor]]]  # index in the list, and the tensor's part of each list
BUFFER = 1 << 25  # bytes of a batch in one list; also where tensors are cut, so a multiple of what other modules add up


class _OnDevice(Protocol):
    """`extraopt.kernels.TensorLists`, of parts that lie on the device."""

    def sums(self, device: torch.device) -> Tensor: ...
    def jump_(self, ratios: Tensor) -> None: ...
    def retreat_(self, retreats: Tensor, weights: Tensor) -> None: ...
    def trial_(self, ratios: Tensor) -> None: ...


_Make = Callable[[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None], _OnDevice]


@dataclass
class Work:
    """Params, anchors and, if any, estimates; the batches that they pass in; what computes on a batch."""

    lists: Sequence[Sequence[Tensor]]
    batches: list[Batch]
    make: _Make


class _Queue:
    """A CUDA stream beside the current one; on other devices work runs in the order in which it is written."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self.after(self.now(device))

    @staticmethod
    def now(device: torch.device) -> Any:
        """The point that the current stream has reached."""
        return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def after(self, event: Any) -> None:
        if self.stream is not None and event is not None:
            self.stream.wait_event(event)

    def running(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def reached(self) -> Any:
        return None if self.stream is None else self.stream.record_event()

    def finish(self) -> None:
        if self.stream is not None:
            self.stream.synchronize()


def _batches(lists: Sequence[Sequence[Tensor]]) -> list[Batch]:
    """Pieces of tensors, as many in a batch as a buffer takes."""
    batches: list[Batch] = []
    room = 0
    for index, tensors in enumerate(zip(*lists)):
        flat = foreach.flat(tensors)
        size = BUFFER // tensors[0].itemsize
        n = tensors[0].numel()
        cuts: list[Sequence[Tensor]] = [tensors] if n else []
        if flat is not None:
            cuts = [[t[start : start + size] for t in flat] for start in range(0, n, size)]
        for cut in cuts:
            taken = _aligned(cut)
            if taken > room:
                batches.append([])
                room = BUFFER
            batches[-1].append((index, cut))
            room -= taken
    return batches


def _aligned(cut: Sequence[Tensor]) -> int:
    """Bytes of a buffer for one list's part of a piece, up to where the fused kernel can read 16 at a time."""
    return (cut[0].numel() * max(t.itemsize for t in cut) + 15) // 16 * 16


def _through(work: Work, back: bool) -> Iterator[tuple[Tensor, _OnDevice]]:
    """Batch by batch, the index and what lies on the device; with `back` the host gets what was made of it."""
    lists, batches = work.lists, work.batches
    device = lists[0][0].device
    sizes = [sum(_aligned(cut) for _, cut in batch) for batch in batches]
    buffers = torch.empty(2, len(lists) - 1, max(sizes, default=0), dtype=torch.uint8, device=device)
    incoming, outgoing = _Queue(device), _Queue(device)
    free: list[Any] = [None, None]
    try:
        for number, batch in enumerate(batches):
            incoming.after(free[number % 2])
            pairs: list[tuple[Tensor, Tensor]] = []
            on_device: list[list[Tensor]] = [[cut[0] for _, cut in batch]]
            with incoming.running():
                for j, buffer in enumerate(buffers[number % 2], 1):
                    start, here = 0, []
                    for _, cut in batch:
                        size = cut[j].numel() * cut[j].itemsize
                        here.append(buffer[start : start + size].view(cut[j].dtype).view(cut[j].shape))
                        pairs.append((cut[j], here[-1].copy_(cut[j], non_blocking=True)))
                        start += _aligned(cut)
                    on_device.append(here)
            if (arrived := incoming.reached()) is not None:
                arrived.wait()
            params, anchors, *estimates = on_device
            yield (
                torch.tensor([i for i, _ in batch], device="cpu"),
                work.make(params, anchors, estimates[0] if estimates else None),
            )
            free[number % 2] = _Queue.now(device)
            if back:
                outgoing.after(free[number % 2])
                with outgoing.running():
                    for host, there in pairs:
                        host.copy_(there, non_blocking=True)
                free[number % 2] = outgoing.reached()
    finally:
        # who reads host memory next asks no stream, and who gets the buffers' memory next doesn't know of these
        incoming.finish()
        outgoing.finish()


def prepare(
    params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None, make: _Make
) -> Work:
    """What the operations take, of parameters that are all on one device; `make` makes `TensorLists`."""
    lists = [params, anchors] if estimates is None else [params, anchors, estimates]
    return Work(lists, _batches(lists), make)


def cycle_sums(work: Work) -> Tensor:
    """The sums of `extraopt.kernels.TensorLists`, on the device of the parameters."""
    params = work.lists[0]
    sums = torch.zeros(len(params), 4, dtype=torch.float64, device=params[0].device)
    for index, lists in _through(work, back=False):
        sums[index] += lists.sums(sums.device)  # in a batch no index comes twice
    return sums


def jump_(work: Work, ratios: Tensor) -> None:
    """The jump of `extraopt.kernels.TensorLists`. When it returns, what it wrote in host memory is complete."""
    for index, lists in _through(work, back=True):
        lists.jump_(ratios[index])


def retreat_(work: Work, retreats: Tensor, weights: Tensor) -> None:
    """The retreat of `extraopt.kernels.TensorLists`. When it returns, what it wrote in host memory is complete."""
    for index, lists in _through(work, back=True):
        lists.retreat_(retreats[index], weights[index])


def trial_(work: Work, ratios: Tensor) -> None:
    """The trial of `extraopt.kernels.TensorLists`."""
    for index, lists in _through(work, back=False):
        lists.trial_(ratios[index])


def anchor_(work: Work) -> None:
    """A <- E. When it returns, the anchors in host memory are complete."""
    params, anchors = work.lists[:2]
    outgoing = _Queue(params[0].device)
    with outgoing.running():
        for p, a in zip(params, anchors):
            a.copy_(p, non_blocking=True)
    outgoing.finish()
