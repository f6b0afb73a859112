"""The rule in plain torch operations: for every tensor that neither the fused kernel nor the C loops can take.

Dense tensors are walked in storage order, in blocks small enough that a block of P, A, V and the scratch stays in
cache: each is read from and written to memory once, and no temporary is larger than a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

# Elements of a block. On a CPU the blocks fill an L2 cache and still hide the overhead of a call; on an accelerator
# (only tensors that the fused kernel refuses come here) launches are what costs, so blocks are large.
_CPU_BLOCK, _ACCELERATOR_BLOCK = 1 << 17, 1 << 24
# Sums run over rows of at most this length, each row on one thread: no thread count changes their order.
_ROW = 1 << 10
Work = tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor] | None]
PLAIN = {Tensor, torch.nn.Parameter}  # a subclass may keep its elements anywhere


def is_dense(t: Tensor) -> bool:
    """Whether the elements of `t` fill a stretch of storage without gaps or overlaps, in any order of dimensions."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for s, n in zip(t.stride(), t.shape) if n != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def same_storage_order(p: Tensor, a: Tensor, v: Tensor | None) -> bool:
    """Whether a parameter, its anchor and its drift are plain dense tensors of one dtype, device, shape and layout.

    Then a kernel can take them for flat stretches of memory.
    """
    dtype, device, shape, stride = p.dtype, p.device, p.shape, p.stride()
    for t in (p, a) if v is None else (p, a, v):
        if type(t) not in PLAIN or t.layout is not torch.strided or t.is_neg():
            return False
        if t is not p and (t.dtype != dtype or t.device != device or t.shape != shape or t.stride() != stride):
            return False
    return is_dense(p)


def flat(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """1-D views in storage order, or None where a layout has gaps or layouts differ."""
    first = tensors[0]
    if all(t.is_contiguous() for t in tensors):
        return [t.view(-1) for t in tensors]
    if any(t.stride() != first.stride() for t in tensors) or not is_dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _block(t: Tensor) -> int:
    return min(t.numel(), _CPU_BLOCK if t.is_cpu else _ACCELERATOR_BLOCK)


def _blocks(tensors: Sequence[Tensor]) -> Iterator[Sequence[Tensor]]:
    n, block = tensors[0].numel(), _block(tensors[0])
    if n == block:
        return iter([tensors] if n else [])
    return ([t[i : i + block] for t in tensors] for i in range(0, n, block))


class _Scratch:
    """Rows of one buffer in the computing dtype, cut to the length asked for.

    Made once, and each cut made once: measured on a list of small tensors, that took the sums from 55 to 35 ms and the
    jump from 35 to 20 ms.
    """

    def __init__(self, p: Tensor, rows: int, size: int) -> None:
        self.buffer = p.new_empty(rows, size, dtype=torch.float64 if p.dtype == torch.float64 else torch.float32)
        self.cuts: dict[int, list[Tensor]] = {}

    def rows(self, n: int) -> list[Tensor]:
        if n not in self.cuts:
            self.cuts[n] = list(self.buffer[:, :n])
        return self.cuts[n]


def _scratches(params: Sequence[Tensor], rows: int) -> dict[bool, _Scratch]:
    """One for float64 tensors (True), one for all others, large enough for any block of theirs."""
    largest: dict[bool, Tensor] = {}
    for p in params:
        wide = p.dtype == torch.float64
        largest[wide] = max(largest.get(wide, p), p, key=_block)
    return {wide: _Scratch(p, rows, _block(p)) for wide, p in largest.items()}


def _as(t: Tensor, row: Tensor) -> Tensor:
    """`t` in the dtype of `row`: `t` itself, or a copy in `row`."""
    return t if t.dtype == row.dtype else row.view(t.shape).copy_(t)


def prepare(params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None) -> Work:
    """What the operations take: real tensors of any layout, all on one device."""
    return params, anchors, estimates


def cycle_sums(work: Work) -> Tensor:
    """The sums of `extraopt.kernels.TensorLists`, on the device."""
    params, anchors, estimates = work
    totals, scratches = [], _scratches(params, 5)
    for i, (p, a) in enumerate(zip(params, anchors)):
        tensors = [p, a] if estimates is None else [p, a, estimates[i]]
        parts = _blocks(flat(tensors) or [t.reshape(-1) for t in tensors])
        sums = [_block_sums(part, scratches[p.dtype == torch.float64]) for part in parts]
        totals.append(torch.stack(sums).sum(0) if sums else torch.zeros(4, dtype=torch.float64, device=p.device))
    return torch.stack(totals)


def _block_sums(part: Sequence[Tensor], scratch: _Scratch) -> Tensor:
    n = part[0].numel()
    dv, dd, vv, ee, d = scratch.rows(n)
    e = _as(part[0], ee)
    torch.sub(e, _as(part[1], d), out=d)
    if len(part) == 3:
        v = _as(part[2], vv)
        torch.mul(d, v, out=dv)
        torch.mul(v, v, out=vv)
    else:
        dv.zero_()
        vv.zero_()
    torch.mul(d, d, out=dd)
    torch.mul(e, e, out=ee)
    products = scratch.buffer[:4, :n]
    body = n // _ROW * _ROW or n
    sums = products[:, :body].view(4, -1, math.gcd(body, _ROW)).sum(-1).sum(1, dtype=torch.float64)
    return sums if body == n else sums + products[:, body:].sum(1)


def _each(work: Work, rows: int) -> Iterator[tuple[int, Sequence[Tensor], _Scratch]]:
    """Index of a tensor, a block of its parameter, anchor and drift estimate to write in, and scratch for it."""
    params, anchors, estimates = work
    scratches = _scratches(params, rows)
    for i, (p, a) in enumerate(zip(params, anchors)):
        tensors = [p, a] if estimates is None else [p, a, estimates[i]]
        views = flat(tensors)
        if views is None:
            yield i, tensors, _Scratch(p, rows, p.numel())
        else:
            for part in _blocks(views):
                yield i, part, scratches[p.dtype == torch.float64]


def _factors(*columns: Tensor) -> dict[bool, list[tuple[float, ...]]]:
    """Each tensor's factors as float64 tensors take them (True), and rounded to float32, as all others do."""
    return {wide: list(zip(*((c if wide else c.float()).tolist() for c in columns))) for wide in (False, True)}


def jump_(work: Work, ratios: Tensor) -> None:
    """The jump of `extraopt.kernels.TensorLists`: float32 (float64 for float64), one rounding into each output."""
    factors = _factors(ratios)
    for i, part, scratch in _each(work, 2):
        _block_jump_(part, scratch, *factors[part[0].dtype == torch.float64][i])


def retreat_(work: Work, retreats: Tensor, weights: Tensor) -> None:
    """The retreat of `extraopt.kernels.TensorLists`, in the arithmetic of the jump."""
    factors = _factors(retreats, weights)
    for i, part, scratch in _each(work, 3):
        _block_retreat_(part, scratch, *factors[part[0].dtype == torch.float64][i])


def trial_(work: Work, ratios: Tensor) -> None:
    """The trial of `extraopt.kernels.TensorLists`, in the arithmetic of the jump."""
    factors = _factors(ratios)
    for i, part, scratch in _each(work, 2):
        _block_trial_(part, scratch, *factors[part[0].dtype == torch.float64][i])


def anchor_(work: Work) -> None:
    """A <- E."""
    params, anchors, _ = work
    if params:
        torch._foreach_copy_(list(anchors), list(params))


def _block_jump_(part: Sequence[Tensor], scratch: _Scratch, ratio: float) -> None:
    p, a = part
    rows = scratch.rows(p.numel())
    e, d = _as(p, rows[0]), rows[1].view(p.shape)  # where e is p itself, the addition writes it in place
    torch.sub(e, _as(a, rows[1]), out=d)
    if ratio:
        e.add_(d, alpha=ratio)
    if e.dtype != p.dtype:
        p.copy_(e)
    a.copy_(p)


def _block_retreat_(part: Sequence[Tensor], scratch: _Scratch, retreat: float, weight: float) -> None:
    p, a, v = part
    rows = scratch.rows(p.numel())
    e, d = _as(p, rows[0]), rows[1].view(p.shape)
    torch.sub(e, _as(a, rows[1]), out=d)
    w = _as(v, rows[2]).lerp_(d, weight)
    if w.dtype != v.dtype:
        v.copy_(w)
    a.copy_(torch.add(e, d, alpha=-retreat, out=d) if retreat else p)


def _block_trial_(part: Sequence[Tensor], scratch: _Scratch, ratio: float) -> None:
    p, a, v = part
    rows = scratch.rows(p.numel())
    w = p.copy_(a) if p.dtype == rows[0].dtype else rows[0].view(p.shape).copy_(a)
    if ratio:
        w.add_(_as(v, rows[1]), alpha=ratio)
    if w.dtype != p.dtype:
        p.copy_(w)
