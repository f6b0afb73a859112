"""How far to dare: pure functions from the sums of a cycle to the gate and to the tensors that must not jump.

Sums come as `extraopt.kernels.cycle_sums` makes them: float64 [T, 4] on the CPU, for each tensor <D, V>, <D, D>,
<V, V> and <E, E>, where D is the drift of this cycle, V the estimate before it and E the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor


def finite(sums: Tensor) -> Tensor:
    """Which tensors have finite weights, anchor and estimate: bool [T]."""
    return sums.isfinite().all(1)


def coherence(sums: Tensor) -> float:
    """cos(D, V) over all tensors together, in [-1, 1]; 0 where D or V is 0."""
    dot, dd, vv, _ = sums.sum(0).tolist()
    norms = dd**0.5 * vv**0.5
    return max(-1.0, min(1.0, dot / norms)) if norms > 0 else 0.0


def openness(cosine: float, gate: float | None) -> float:
    """clip(cos / gate, 0, 1), rounded to the nearest multiple of 1/256; 1 where there is no gate.

    The rounding keeps the order in which sums were taken (threads, ranks, implementation) out of the weights.
    """
    if gate is None:
        return 1.0
    return round(256 * max(0.0, min(1.0, cosine / gate))) / 256


def still(sums: Tensor) -> Tensor:
    """Which tensors did not move in this cycle or have no estimate yet: bool [T]. A gated one of them does not jump."""
    return (sums[:, 1] == 0) | (sums[:, 2] == 0)


def averaged_norm(sums: Tensor, beta: float) -> Tensor:
    """||beta * V + (1 - beta) * D|| of each tensor, float64 [T]: the length of the estimate that the jump will use."""
    dot, dd, vv, _ = sums.unbind(1)
    return (beta**2 * vv + 2 * beta * (1 - beta) * dot + (1 - beta) ** 2 * dd).clamp(min=0).sqrt()


def overflows(sums: Tensor, norms: Tensor, ratios: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """Which tensors could leave their dtype's range: bool [T]. No element of E + rV is larger than ||E|| + r||V||."""
    limits = torch.tensor([torch.finfo(dtype).max for dtype in dtypes], dtype=torch.float64)
    return sums[:, 3].sqrt() + ratios * norms > limits
