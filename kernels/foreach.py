"""The rule in plain torch operations: the CPU path, and every tensor the fused kernel cannot take.

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


def _flat(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """1-D views in storage order, or None where a layout has gaps or layouts differ."""
    first = tensors[0]
    if any(t.stride() != first.stride() for t in tensors) or not is_dense(first):
        return None
    return [t.as_strided((t.numel(),), (1,)) for t in tensors]


def _blocks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    n, block = tensors[0].numel(), _CPU_BLOCK if tensors[0].is_cpu else _ACCELERATOR_BLOCK
    for start in range(0, n, block):
        yield [t[start : start + block] for t in tensors] if n > block else list(tensors)


def _compute_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def cycle_sums(params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None) -> Tensor:
    """What the gate needs to know of each tensor, read only.

    Args:
        params: E, T real floating tensors of any shapes and layouts, on one device.
        anchors: A, of the same shapes and dtypes.
        drifts: V, likewise, or None where the rule keeps no estimate.

    Returns:
        float64 [T, 4]: <D, V>, <D, D>, <V, V>, <E, E> with D = E - A; NaN or inf wherever an input is not finite.
    """
    rows = []
    for i, (p, a) in enumerate(zip(params, anchors)):
        tensors = [p, a] if drifts is None else [p, a, drifts[i]]
        total = torch.zeros(4, dtype=torch.float64, device=p.device)
        for part in _blocks(_flat(tensors) or [t.reshape(-1) for t in tensors]):
            total += _block_sums(*(t.to(_compute_dtype(p)) for t in part))
        rows.append(total)
    return torch.stack(rows) if rows else torch.zeros(0, 4, dtype=torch.float64)


def _block_sums(e: Tensor, a: Tensor, v: Tensor | None = None) -> Tensor:
    products = torch.empty(4, e.numel(), dtype=e.dtype, device=e.device)
    d = e - a
    if v is None:
        products[::2] = 0
    else:
        torch.mul(d, v, out=products[0])
        torch.mul(v, v, out=products[2])
    torch.mul(d, d, out=products[1])
    torch.mul(e, e, out=products[3])
    body = e.numel() // _ROW * _ROW or e.numel()
    row = math.gcd(body, _ROW)
    sums: Tensor = products[:, :body].reshape(4, -1, row).sum(-1).sum(1, dtype=torch.float64)
    return sums if body == e.numel() else sums + products[:, body:].sum(1)


def jump_(
    params: Sequence[Tensor],
    anchors: Sequence[Tensor],
    drifts: Sequence[Tensor] | None,
    ratios: Sequence[float],
    weight: float,
) -> None:
    """End the cycle in place: V <- lerp(V, D, weight), P <- P + ratio * V, A <- P, with D = P - A.

    Args:
        params: E, T real floating tensors of any shapes and layouts, on one device; P on return.
        anchors: A, of the same shapes and dtypes; the new P on return.
        drifts: V, likewise; None means V = D and nothing is kept.
        ratios: g * N / k for each tensor; 0 leaves its weights as they are, bit for bit.
        weight: 1 - extra_beta.

    Arithmetic is float32 (float64 for float64 tensors) with one rounding into each output. Inputs must be finite.
    """
    for i, (p, a) in enumerate(zip(params, anchors)):
        tensors = [p, a] if drifts is None else [p, a, drifts[i]]
        flat = _flat(tensors)
        for part in [tensors] if flat is None else _blocks(flat):
            _block_jump_(*part, ratio=ratios[i], weight=weight)


def _block_jump_(p: Tensor, a: Tensor, drift: Tensor | None = None, *, ratio: float, weight: float) -> None:
    dtype = _compute_dtype(p)
    e = p.to(dtype)  # p itself where it has the computing dtype: the operations below then write it in place
    v = e - a.to(dtype)
    if drift is not None:
        v = drift.to(dtype).lerp_(v, weight)
        if v is not drift:
            drift.copy_(v)
    if ratio:
        e.add_(v, alpha=ratio)
        if e is not p:
            p.copy_(e)
    a.copy_(p)
