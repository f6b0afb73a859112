"""The rule in float64: what every other implementation is tested against."""

from __future__ import annotations

from collections.abc import Sequence

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
    jump: bool = True,
) -> tuple[list[Tensor], list[Tensor], float]:
    """End one cycle over a list of real tensors, in float64 and out of place.

    Args:
        weights: E, the weights after the cycle's last applied step, any shapes and real dtypes.
        anchors: A, the weights at the start of the cycle, same shapes.
        drifts: V, the drift estimate so far, same shapes; zeros where there is none yet.
        every: k, applied steps in a cycle.
        steps: N, steps to jump.
        beta: b, averaging of the drift over cycles, in [0, 1).
        gate: coherence at which the gate is fully open; ``None`` keeps it open.
        jump: False re-anchors without moving (before ``extra_start``).

    Returns:
        New weights (which are also the new anchors), new drifts, both float64, and the gate in [0, 1].

    Source: RL-Extra (arXiv 2601.04537) is ``beta=0, gate=None``; averaging and gate are extraopt's.
    """
    E, A, V = ([t.double() for t in ts] for ts in (weights, anchors, drifts))
    D = [e - a for e, a in zip(E, A)]
    dot = sum(float((d * v).sum()) for d, v in zip(D, V))
    norms = sum(float((d * d).sum()) for d in D) ** 0.5 * sum(float((v * v).sum()) for v in V) ** 0.5
    g = 1.0 if gate is None else round(256 * min(max(dot / norms / gate, 0.0), 1.0)) / 256 if norms > 0 else 0.0
    new_V = [beta * v + (1 - beta) * d for v, d in zip(V, D)]
    new_W = []
    for e, d, v, nv in zip(E, D, V, new_V):
        # a gated tensor that stood still, or has no estimate yet, does not ride on the coherence of the others
        still = gate is not None and not (bool(d.any()) and bool(v.any()))
        new_W.append(e if still or not jump else e + g * (steps / every) * nv)
    return new_W, new_V, g
