"""The rule in float64: what every other implementation is tested against."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def end_cycle(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    drifts: Sequence[Tensor],
    *,
    every: int,
    steps: float,
    beta: float,
    gate: float | None,
    momentum: float,
    seen: int,
    jump: bool = True,
) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """End one cycle over a list of real tensors, in float64 and out of place.

    Args:
        weights: E, the weights after the cycle's last applied step, any shapes and real dtypes.
        anchors: A, the weights at the start of the cycle, same shapes.
        drifts: V, the drift estimate so far, same shapes; zeros where there is none yet.
        every: k, applied steps in a cycle.
        steps: N, steps to jump.
        beta: b, averaging of the drift over cycles, in [0, 1).
        gate: way from no coherence to full at which a gate is fully open; ``None`` keeps it open.
        momentum: decay of the optimizer's momentum (AdamW's beta1), which makes drifts agree where nothing else does.
        seen: drifts that the estimate has taken in so far.
        jump: False re-anchors without moving (before ``extra_start``).

    Returns:
        New weights (which are also the new anchors), new drifts, both float64, and the gates in [0, 1].

    Source: RL-Extra (arXiv 2601.04537) is ``beta=0, gate=None``; averaging, gate and retreat are extraopt's.
    """
    # cos(D, V) if gradients were white noise: steps would have covariance momentum^lag, drifts are sums of k of them
    n = max(1, min(seen, 300))
    lags = torch.arange((n + 1) * every, dtype=torch.float64)
    steps_cov = momentum ** (lags[:, None] - lags).abs()
    cov = steps_cov.view(n + 1, every, n + 1, every).sum((1, 3))  # of this drift, and of those before it
    age = torch.arange(n, dtype=torch.float64)
    w = (1 - beta) * beta**age
    floor = float(cov[0, 1:] @ w / (cov[0, 0] * (w @ cov[1:, 1:] @ w)).sqrt())

    horizon = steps if gate is None else steps * seen / (seen + 1)
    E, A, V = ([t.double() for t in ts] for ts in (weights, anchors, drifts))
    new_W: list[Tensor] = []
    new_V: list[Tensor] = []
    gates: list[float] = []
    for e, a, v in zip(E, A, V):
        d = e - a
        nv = beta * v + (1 - beta) * d
        norms = float(d.norm()) * float(v.norm())
        cosine = float((d * v).sum()) / norms if norms > 0 else 0.0
        g = 1.0 if gate is None else round(256 * min(max((cosine - floor) / (gate * (1 - floor)), 0.0), 1.0)) / 256
        # a gated tensor that stood still, or has no estimate yet, has nothing to go by
        if not jump or (gate is not None and norms == 0):
            g, w = 0.0, e
        else:
            size = float(d.norm() / e.norm()) if e.norm() > 0 else math.inf
            back = round(256 * (1 - g) * min(1.0, 100 * size)) / 512
            w = e + g * (horizon / every) * nv - back * d
        new_W, new_V, gates = [*new_W, w], [*new_V, nv], [*gates, g]
    return new_W, new_V, gates


def retreat(
    weights: Sequence[Tensor],
    anchors: Sequence[Tensor],
    drifts: Sequence[Tensor],
    retreats: Sequence[float],
    shares: Sequence[float],
) -> tuple[list[Tensor], list[Tensor]]:
    """Take the drift into the estimate, and leave the anchor behind the weights by a part of the drift.

    Args:
        weights: E, any shapes and real dtypes.
        anchors: A, same shapes.
        drifts: V, the estimates, same shapes.
        retreats: part of D = E - A that each anchor stays behind.
        shares: of the new drift in each estimate.

    Returns:
        New anchors E - retreat * D and new estimates V + share * (D - V), both float64.
    """
    E, A, V = ([t.double() for t in ts] for ts in (weights, anchors, drifts))
    new_A = [e - r * (e - a) for e, a, r in zip(E, A, retreats)]
    new_V = [v + w * (e - a - v) for e, a, v, w in zip(E, A, V, shares)]
    return new_A, new_V


def trial(anchors: Sequence[Tensor], drifts: Sequence[Tensor], ratios: Sequence[float]) -> list[Tensor]:
    """Weights A + ratio * V of each tensor, float64."""
    return [a.double() + r * v.double() for a, v, r in zip(anchors, drifts, ratios)]


def anchor(weights: Sequence[Tensor]) -> list[Tensor]:
    """Anchors at the weights, float64."""
    return [e.double() for e in weights]
