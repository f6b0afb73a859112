"""How far to dare: pure functions from the sums of a cycle to gates, and to the tensors that must not jump.

Sums come as `extraopt.kernels.TensorLists.sums` makes them: float64 [T, 4] on the CPU, for each tensor <D, V>, <D, D>,
<V, V> and <E, E>, where D is the drift of this cycle, V the estimate before it and E the weights.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

RETREAT = 0.5  # part of its drift that a tensor goes back where its gate is shut: Lookahead with alpha = 1 - RETREAT
NEWEST = 1.0  # of a gate's square: the weight at least of the newest drift in the estimate
LARGE = 0.01  # a drift as a part of its weights; of what is smaller the retreat is in proportion less


def finite(sums: Tensor) -> Tensor:
    """Which tensors have finite weights, anchor and estimate: bool [T]."""
    return sums.isfinite().all(1)


def coherence(sums: Tensor) -> Tensor:
    """cos(D, V) of each tensor, float64 [T] in [-1, 1]; 0 where D or V is 0."""
    dot, dd, vv, _ = sums.unbind(1)
    norms = dd.sqrt() * vv.sqrt()
    return (dot / norms.where(norms > 0, torch.inf)).clamp(-1, 1)


@functools.lru_cache(maxsize=1024)
def _neighbours(every: float, momentum: float) -> tuple[float, float]:
    """Of a run without a direction: cov(D_i, D_(i+1)) / var(D), and by how much each further cycle lessens it.

    Gradients are taken for white noise and Adam's denominator for constant, so that a step is an exponential average of
    noise and a drift is a sum of `every` of them: covariances of drifts are geometric sums. Restoring forces make real
    noise less coherent than this, so that it errs on the careful side.
    """
    fade = momentum**every
    geometric = (1 - fade) / (1 - momentum)
    dd = every * (1 + momentum) / (1 - momentum) - 2 * momentum * geometric / (1 - momentum)
    return momentum * geometric**2 / dd, fade


def averaged_noise(cov: Tensor, var: Tensor, weights: Tensor, every: float, momentum: float) -> tuple[Tensor, Tensor]:
    """What V <- V + w (D - V) makes of the covariances of a run that has no direction but its momentum.

    Args:
        cov: covariance of V with the next drift, in units of a drift's variance, float64 [T]; 0 where V is 0.
        var: variance of V, likewise.
        weights: w, float64 [T].
        every: k, optimizer steps in a drift, > 0.
        momentum: decay of the optimizer's momentum, in [0, 1): AdamW's beta1.

    Returns:
        The two after the average has taken in a drift.
    """
    neighbours, fade = _neighbours(every, momentum)
    kept = 1 - weights
    return kept * fade * cov + weights * neighbours, kept**2 * var + 2 * weights * kept * cov + weights**2


def noise_floor(cov: Tensor, var: Tensor) -> Tensor:
    """The cos(D, V) of a run without a direction, from the optimizer's momentum alone, float64 [T] in [0, 1)."""
    return cov / var.sqrt().where(var > 0, torch.inf)


def plain_weights(seen: Tensor, beta: float) -> Tensor:
    """How much an estimate of `seen` drifts takes over from the next: 1 / (seen + 1), and 1 - b at least; float64 [T].

    So it is the plain mean of the first drifts, without a bias towards 0, and then an exponential average.
    """
    return (1 / (seen.double() + 1)).clamp(min=1 - beta)


def momentum_coherence(every: float, beta: float = 0.0, momentum: float = 0.9, seen: int = 1 << 30) -> float:
    """The noise floor of an estimate of `seen` drifts, >= 1, that were averaged by `plain_weights` alone.

    Args:
        every: k, optimizer steps in a drift, > 0.
        beta: b, averaging of the drifts, in [0, 1); 0 compares with the drift before.
        momentum: decay of the optimizer's momentum, in [0, 1): AdamW's beta1.
        seen: drifts in the estimate so far, >= 1. An estimate of few drifts agrees more with the next one.
    """
    return float(noise_floor(*plain_noise(every, beta, momentum, seen)))


def plain_noise(every: float, beta: float, momentum: float, seen: int) -> tuple[Tensor, Tensor]:
    """`averaged_noise` after `seen` drifts by `plain_weights` alone: float64 [1] each."""
    neighbours, fade = _neighbours(every, momentum)
    # both stretches repeat one linear map, so that powers of it take as many products as `seen` has bits; nothing in
    # them is negative, so that none of their digits cancel
    first = min(seen, int(1 / (1 - beta)))  # drifts of which the estimate is the plain mean: here first their sum
    noise = torch.linalg.matrix_power(_affine([fade, 0, neighbours], [2, 1, 1]), first)[:2, 2]
    drifts = float(max(first, 1))
    noise /= torch.tensor([drifts, drifts**2], device="cpu")
    weight = 1 - beta
    average = _affine([beta * fade, 0, weight * neighbours], [2 * weight * beta, beta**2, weight**2])
    cov, var = (torch.linalg.matrix_power(average, seen - first) @ torch.cat([noise, torch.ones(1, device="cpu")]))[:2]
    return cov.view(1), var.view(1)


def _affine(cov: list[float], var: list[float]) -> Tensor:
    """The map of (cov, var, 1), float64 [3, 3], that has these rows."""
    return torch.tensor([cov, var, [0, 0, 1]], dtype=torch.float64, device="cpu")


def openness(cosines: Tensor, gate: float | None, floor: Tensor) -> Tensor:
    """clip((cos - floor) / (gate * (1 - floor)), 0, 1) to the nearest multiple of 1/256, float64 [T]; no gate: 1.

    Nothing opens at or below `floor`, float64 [T], which is what a run without a direction would show; all is open
    where the coherence has come the fraction `gate` of the way from there to 1. The rounding keeps the order in which
    sums were taken (threads, ranks, implementation) out of the weights.
    """
    if gate is None:
        return torch.ones_like(cosines)
    return (256 * ((cosines - floor) / (gate * (1 - floor))).clamp(0, 1)).round() / 256


def retreats(sums: Tensor, opens: Tensor) -> Tensor:
    """Which part of its drift each tensor goes back, float64 [T] in [0, RETREAT], in steps of RETREAT / 256.

    (1 - g) / 2 where the drift is a hundredth of the weights or more, and less of a smaller one, in proportion: noise
    far below the weights does no harm, but to retreat from it costs learning.

    Args:
        sums: float64 [T, 4].
        opens: the gates g, float64 [T].

    Source: extraopt's own; `benchmarks/rlvr/compare.py` compares it with none (`gate.RETREAT=0`), and docs/results.md
    tells of one from drifts of any size.
    """
    size = (sums[:, 1] / sums[:, 3]).sqrt() / LARGE
    return (256 * (1 - opens) * size.nan_to_num(0.0, posinf=1.0).clamp(max=1)).round() * (RETREAT / 256)


def without_estimate(sums: Tensor) -> Tensor:
    """Which tensors have no estimate yet: bool [T]. A gated one of them stays, as does one that did not move."""
    return sums[:, 2] == 0


def averaged_norm(sums: Tensor, weights: Tensor) -> Tensor:
    """||V + w (D - V)|| of each tensor, float64 [T]: the length of the estimate that the jump will use."""
    dot, dd, vv, _ = sums.unbind(1)
    kept = 1 - weights
    return (kept**2 * vv + 2 * weights * kept * dot + weights**2 * dd).clamp(min=0).sqrt()


def overflows(sums: Tensor, jumps: Tensor, dtypes: list[torch.dtype]) -> Tensor:
    """Which tensors could leave their dtype's range by jumps of these lengths: bool [T].

    No element of a sum is larger than the sum of the norms.
    """
    largest = {dtype: torch.finfo(dtype).max for dtype in set(dtypes)}
    limits = torch.tensor([largest[dtype] for dtype in dtypes], dtype=torch.float64, device="cpu")
    return sums[:, 3].sqrt() + jumps > limits
