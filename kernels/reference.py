"""The rule in float64: what every other implementation is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def end_cycle(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    estimates: Sequence[Tensor],
    taken: Sequence[Sequence[float]],
    *,
    every: int,
    length: float,
    beta: float,
    gate: float | None,
    momentum: float,
    jump: bool = True,
) -> tuple[list[Tensor], list[Tensor], list[float], list[float]]:
    """End one cycle over a list of real tensors, in float64 and out of place.

    Args:
        weights: E, the weights after the cycle's last applied step, any shapes and real dtypes.
        anchors: A, the weights at the start of the cycle, same shapes.
        estimates: V, the drift estimate so far, same shapes; zeros where there is none yet.
        taken: of each tensor the weights w by which its estimate has taken in drifts so far, oldest first.
        every: k, applied steps in a cycle.
        length: h, steps to jump where a gate is open.
        beta: b, averaging of the drift over cycles, in [0, 1).
        gate: way from no coherence to full at which a gate is fully open; ``None`` keeps it open.
        momentum: decay of the optimizer's momentum (AdamW's beta1), which makes drifts agree where nothing else does.
        jump: False re-anchors without moving (before ``extra_start``).

    Returns:
        New weights (which are also the new anchors), new estimates, both float64, the gates in [0, 1], and the w by
        which this drift was taken in.

    Source: RL-Extra (arXiv 2601.04537) is ``beta=0, gate=None``; averaging, gate and retreat are extraopt's.
    """
    E, A, V = ([t.double() for t in ts] for ts in (weights, anchors, estimates))
    new_W: list[Tensor] = []
    new_V: list[Tensor] = []
    gates: list[float] = []
    new_w: list[float] = []
    for e, a, v, before in zip(E, A, V, taken):
        d = e - a
        norms = float(d.norm()) * float(v.norm())
        cosine = float((d * v).sum()) / norms if norms > 0 else 0.0
        floor = _noise_floor(before, every, momentum)
        g = 1.0 if gate is None else round(256 * min(max((cosine - floor) / (gate * (1 - floor)), 0.0), 1.0)) / 256
        # a gated tensor that did not move, or has no estimate yet, has nothing to go by
        moves = jump and (gate is None or float(v.norm()) > 0)
        w = max(1 / (len(before) + 1), 1 - beta, g * g if moves and gate is not None else 0.0)
        nv = v + w * (d - v)
        landed = e
        if moves:
            size = float(d.norm() / e.norm()) if e.norm() > 0 else math.inf
            back = round(256 * (1 - g) * min(1.0, 100 * size)) / 512
            landed = e - back * d + length * g / every * nv
        new_W, new_V = [*new_W, landed], [*new_V, nv]
        gates, new_w = [*gates, g if moves else 0.0], [*new_w, w]
    return new_W, new_V, gates, new_w


def _noise_floor(taken: Sequence[float], every: int, momentum: float) -> float:
    """cos(D, V) if gradients were white noise: steps have covariance momentum^lag, drifts are sums of k of them."""
    n = len(taken)
    if not n:
        return 0.0
    lags = torch.arange((n + 1) * every, dtype=torch.float64)
    steps_cov = momentum ** (lags[:, None] - lags).abs()
    cov = steps_cov.view(n + 1, every, n + 1, every).sum((1, 3))  # of the drifts so far, oldest first, and the next
    share = torch.zeros(n, dtype=torch.float64)  # of each drift in V
    for i, w in enumerate(taken):
        share = share * (1 - w)
        share[i] = w
    return float(cov[-1, :-1] @ share / (cov[-1, -1] * (share @ cov[:-1, :-1] @ share)).sqrt())


def retreat(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    estimates: Sequence[Tensor],
    retreats: Sequence[float],
    shares: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Take the drift into the estimate, and leave the anchor behind the weights by a part of the drift.

    Args:
        weights: E, any shapes and real dtypes.
        anchors: A, same shapes.
        estimates: V, same shapes.
        retreats: part of D = E - A that each anchor stays behind.
        shares: of the new drift in each estimate.

    Returns:
        New anchors E - retreat * D and new estimates V + share * (D - V), both float64.
    """
    E, A, V = ([t.double() for t in ts] for ts in (weights, anchors, estimates))
    new_A = [e - r * (e - a) for e, a, r in zip(E, A, retreats)]
    new_V = [v + w * (e - a - v) for e, a, v, w in zip(E, A, V, shares)]
    return new_A, new_V


def trial(anchors: Sequence[Tensor], estimates: Sequence[Tensor], ratios: Sequence[float]) -> list[Tensor]:
    """Weights A + ratio * V of each tensor, float64."""
    return [a.double() + r * v.double() for a, v, r in zip(anchors, estimates, ratios)]


def anchor(weights: Sequence[Tensor]) -> list[Tensor]:
    """Anchors at the weights, float64."""
    return [e.double() for e in weights]
