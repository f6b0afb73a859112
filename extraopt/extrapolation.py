"""The end of a cycle over lists of tensors: drift, gate, jump, re-anchor. Knows no optimizer class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import gate as gates
from .kernels import TensorLists
from .sharding import local, sum_over_shards


@dataclass(frozen=True)
class JumpReport:
    """What the end of a cycle did.

    Attributes:
        step: applied optimizer steps of the tensors concerned (the largest, where they differ).
        gate: how far the gates were open, 0 (nothing jumped) to 1 (all, as far as the drifts seen allow): the root
            mean square over tensors, by the squared length of their estimates.
        coherence: cos(drift of this cycle, estimate so far) over all gated tensors together, -1 to 1.
        drift_norm: ||V||, the estimate after this cycle, in weight units.
        weight_norm: ||W|| before the jump.
        jumped: tensors that jumped, be it little.
        refused: tensors left where they were because a number was not finite or would have left its dtype's range.
    """

    step: int
    gate: float
    coherence: float
    drift_norm: float
    weight_norm: float
    jumped: int
    refused: int


@dataclass(frozen=True)
class CycleBatch:
    """Tensors whose cycles end together under the same hyperparameters.

    Attributes:
        anchors, estimates: A and V of each tensor; no estimates where the rule keeps none.
        steps: applied optimizer steps of each tensor.
        seen: drifts that each tensor's estimate has taken in so far.
        horizon: N, the longest jump, in steps.
        momentum: decay of the optimizer's momentum, which makes drifts agree where nothing else does.
    """

    params: list[Tensor]
    anchors: list[Tensor]
    estimates: list[Tensor] | None
    steps: list[int]
    seen: list[int]
    every: int
    horizon: float
    beta: float
    gate: float | None
    start: int
    momentum: float
    differentiable: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the end of a cycle did to the tensors of a batch.

    Attributes:
        ratios: each tensor's jump as a multiple of its estimate.
        reset: indices of the tensors whose estimate was not finite and is zeros again.
    """

    ratios: list[float]
    reset: list[int]


def averaging(every: int, horizon: int, beta: float | None) -> float:
    """The b that is used: `beta`, or max(0, 1 - k / N) for None."""
    if beta is not None:
        return beta
    return max(0.0, 1 - every / horizon) if horizon else 0.0


def keeps_estimate(every: int, horizon: int, beta: float | None, gate: float | None) -> bool:
    """Whether the rule needs an estimate besides the anchor: not for the paper's (b = 0, no gate)."""
    return gate is not None or averaging(every, horizon, beta) > 0


def _lists(params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None) -> TensorLists:
    return TensorLists(local(params), local(anchors), None if estimates is None else local(estimates))


def _tabulated(batches: Sequence[CycleBatch], tables: list[TensorLists]) -> list[TensorLists]:
    """The tables of each batch: where they still hold, those of the last end of a cycle."""
    made = []
    for i, batch in enumerate(batches):
        lists = local(batch.params), local(batch.anchors), None if batch.estimates is None else local(batch.estimates)
        made.append(tables[i] if i < len(tables) and tables[i].still_fits(*lists) else TensorLists(*lists))
    return made


@torch.no_grad()
def end_cycle(batches: Sequence[CycleBatch], tables: list[TensorLists]) -> tuple[JumpReport, list[Outcome]]:
    """End the cycle of every tensor of `batches`: decide how far each of them may jump, then jump and re-anchor.

    Each tensor has a gate of its own. As far as it is shut the tensor retreats, by up to half of a drift that is large
    beside its weights. A tensor whose drift, estimate or weights are not finite, or whose jump could leave its dtype's
    range, is refused: it keeps its weights, gets a new anchor, and a RuntimeWarning says so.

    Args:
        batches: at least one, none empty; floating or complex tensors of any shapes, layouts and devices, DTensors too.
            Their params, anchors and estimates are written in place.
        tables: what this function left there when it was last called, or empty; written in place.

    Returns:
        What was done, over all batches and for each of them.

    Source: as :class:`~extraopt.ExtraAdam`; for one batch, `kernels/reference.py` says the same in float64.
    """
    tables[:] = _tabulated(batches, tables)
    sums = [sum_over_shards(own.sums(), batch.params) for batch, own in zip(batches, tables)]
    gated = [s for batch, s in zip(batches, sums) if batch.gate is not None] or sums
    all_sums = torch.cat(gated)
    cosine = float(gates.coherence(all_sums[gates.finite(all_sums)].sum(0, keepdim=True)))

    outcomes: list[Outcome] = []
    gated_sq, drift_sq, weight_sq, jumped, refused = 0.0, 0.0, 0.0, 0, []
    for batch, own, s in zip(batches, tables, sums):
        finite = gates.finite(s)
        may = finite & (torch.tensor(batch.steps) >= batch.start) & (batch.horizon > 0)
        if batch.gate is not None:
            may &= ~gates.without_estimate(s)
        of_seen = {
            n: (
                gates.momentum_coherence(batch.every, batch.beta, batch.momentum, max(1, n)),
                gates.growth(n, batch.gate),
            )
            for n in set(batch.seen)
        }
        floor, grown = torch.tensor([of_seen[n] for n in batch.seen], dtype=torch.float64).unbind(1)
        g = gates.openness(gates.coherence(s), batch.gate, floor)
        ratios = (g * grown * batch.horizon / batch.every).where(may, 0.0)
        retreats = gates.retreats(s, g).where(may, 0.0)
        norms = gates.averaged_norm(s, batch.beta)
        jumps = ratios * norms + retreats * s[:, 1].sqrt()
        overflow = gates.overflows(s, jumps, [p.dtype for p in batch.params]) & (jumps > 0)
        ratios[overflow] = retreats[overflow] = 0.0
        reset = [] if batch.estimates is None else (~s[:, 2].isfinite()).nonzero().flatten().tolist()
        outcomes.append(Outcome(ratios.tolist(), reset))
        _apply(batch, own, finite.tolist(), outcomes[-1], retreats.tolist())

        gated_sq += float((norms * g)[ratios > 0].square().sum())
        drift_sq += float(norms[finite].square().sum())
        weight_sq += float(s[finite, 3].sum())
        jumped += int((ratios > 0).sum())
        refused += [batch.params[i] for i in (~finite | overflow).nonzero().flatten().tolist()]

    step = max(max(batch.steps) for batch in batches)
    if refused:
        warnings.warn(
            f"extraopt: {len(refused)} of {sum(len(batch.params) for batch in batches)} tensors did not jump at "
            f"applied step {step}: a weight, anchor or drift is not finite, or the jump could overflow (first: shape "
            f"{tuple(refused[0].shape)}, {refused[0].dtype}). Their weights were left as they are and re-anchored.",
            RuntimeWarning,
            stacklevel=2,
        )
    gate = (gated_sq / drift_sq) ** 0.5 if drift_sq > 0 else 0.0
    return JumpReport(step, gate, cosine, drift_sq**0.5, weight_sq**0.5, jumped, len(refused)), outcomes


def _apply(batch: CycleBatch, lists: TensorLists, finite: list[bool], outcome: Outcome, retreats: list[float]) -> None:
    params, anchors, estimates, ratios = batch.params, batch.anchors, batch.estimates, outcome.ratios
    if estimates is not None:
        for i in outcome.reset:
            estimates[i].zero_()
    if not all(finite):
        chosen = [i for i, ok in enumerate(finite) if ok]
        for i in set(range(len(finite))) - set(chosen):
            anchors[i].copy_(params[i])
        params, anchors = [params[i] for i in chosen], [anchors[i] for i in chosen]
        ratios, retreats = [ratios[i] for i in chosen], [retreats[i] for i in chosen]
        estimates = None if estimates is None else [estimates[i] for i in chosen]
        lists = _lists(params, anchors, estimates)
    if not batch.differentiable:
        lists.jump_(ratios, retreats, 1 - batch.beta)
        return
    # the jump is a constant to autograd: gradients pass through it unchanged
    landed = [p.detach().clone() for p in params]
    _lists(landed, anchors, estimates).jump_(ratios, retreats, 1 - batch.beta)
    with torch.enable_grad():
        for p, w in zip(params, landed):
            p.add_(w - p.detach())
    for p, a in zip(params, anchors):
        a.copy_(p.detach())


@torch.no_grad()
def roll_back(
    params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor], ratios: Sequence[float]
) -> None:
    """Undo a jump, up to rounding, and keep the steps since: each W and A moves by -ratio * V, in place.

    Only as long as V is what the jump used: before the next cycle ends. A tensor that is not finite, or would leave its
    dtype's range, stays where it is.
    """
    sums = sum_over_shards(_lists(params, anchors, estimates).sums(), params)
    jumps = torch.tensor(ratios, dtype=torch.float64) * sums[:, 2].sqrt()
    fits = gates.finite(sums) & ~gates.overflows(sums, jumps, [p.dtype for p in params])
    for p, a, v, ratio, ok in zip(local(params), local(anchors), local(estimates), ratios, fits.tolist()):
        for t in (p, a) if ratio and ok else ():
            wide = torch.promote_types(t.dtype, torch.float32)  # one rounding
            t.copy_(torch.sub(t.to(wide), v.to(t.device, wide), alpha=ratio))
