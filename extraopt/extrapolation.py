"""The end of a cycle over lists of tensors: drift, gate, jump, re-anchor. Knows no optimizer class."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from . import gate as gates
from .kernels import TensorLists
from .sharding import local, sum_over_shards
from .trust import Length, Reach
from .undisturbed import signals_wait


@dataclass(frozen=True)
class JumpReport:
    """What the end of a cycle did.

    Attributes:
        step: applied optimizer steps of the tensors concerned (the largest, where they differ).
        length: h, how many steps ahead an open gate let a tensor jump; 0 where nothing jumped.
        gate: how far the gates were open, 0 to 1, whatever the length: the root mean square over tensors, by the
            squared length of their estimates; with a gate, 0 in the first cycle.
        coherence: cos(drift of this cycle, estimate so far) over all gated tensors together, -1 to 1.
        kl: mean KL divergence by the cycle, in nats: that of the model's outputs before the jump from those after it,
            times (1 + s / length)^2, where the real steps went as far along the jump as s steps of it; NaN if nothing
            jumped or nothing was measured.
        fall: mean of the largest fall of a plausible token's log-probability by the cycle, in nats: that of the jump,
            times 1 + s / length; likewise.
        drift_norm: ||V||, the estimate after this cycle, in weight units.
        weight_norm: ||W|| before the jump.
        jumped: tensors that jumped, be it little.
        refused: tensors left where they were because a number was not finite or would have left its dtype's range.
    """

    step: int
    length: float
    gate: float
    coherence: float
    kl: float
    fall: float
    drift_norm: float
    weight_norm: float
    jumped: int
    refused: int

    def __eq__(self, other: object) -> bool:
        """Whether all numbers are the same; what was not measured is the same as what was not measured."""
        if not isinstance(other, JumpReport):
            return NotImplemented
        # a dataclass's own compares field by field from Python 3.13 on, and NaN is not NaN
        return all(a == b or (a != a and b != b) for a, b in zip(vars(self).values(), vars(other).values()))


@dataclass(frozen=True)
class CycleBatch:
    """Tensors whose cycles end together under the same hyperparameters.

    Attributes:
        anchors, estimates: A and V of each tensor; no estimates where the rule keeps none.
        noise: of each tensor, what momentum alone would make of cov(D, V) and var(V), see `gate.averaged_noise`.
        steps: applied optimizer steps of each tensor.
        seen: drifts that each tensor's estimate has taken in so far.
        horizon: N, the longest jump, in steps.
        limited: whether the trust region chooses the length, or each jump is N steps long.
        momentum: decay of the optimizer's momentum, which makes drifts agree where nothing else does.
    """

    params: list[Tensor]
    anchors: list[Tensor]
    estimates: list[Tensor] | None
    noise: list[tuple[float, float]]
    steps: list[int]
    seen: list[int]
    every: int
    horizon: int
    beta: float
    gate: float | None
    start: int
    limited: bool
    momentum: float
    differentiable: bool = False


@dataclass(frozen=True)
class Outcome:
    """What the end of a cycle made of the tensors of a batch.

    Attributes:
        noise: as in the batch, after this cycle.
        reset: indices of the tensors whose estimate was not finite and is zeros again.
    """

    noise: list[tuple[float, float]]
    reset: list[int]


Choose = Callable[[Callable[[float], None], Reach], Length | None]


def _tabulated(batches: Sequence[CycleBatch], tables: list[TensorLists]) -> list[TensorLists]:
    """The tables of each batch: where they still hold, those of the last end of a cycle."""
    made = []
    for i, batch in enumerate(batches):
        lists = local(batch.params), local(batch.anchors), None if batch.estimates is None else local(batch.estimates)
        made.append(tables[i] if i < len(tables) and tables[i].still_fits(*lists) else TensorLists(*lists))
    return made


class _Jump:
    """One batch at the end of its cycle: what was decided of it from its sums, and then done."""

    def __init__(self, batch: CycleBatch, lists: TensorLists, sums: Tensor, longest: float) -> None:
        self.batch, self.lists, self.sums = batch, lists, sums
        self.longest = min(longest, batch.horizon) if batch.limited else float(batch.horizon)
        self.finite = gates.finite(sums)
        cov, var = torch.tensor(batch.noise, dtype=torch.float64, device="cpu").view(-1, 2).unbind(1)
        may = self.finite & (torch.tensor(batch.steps, device="cpu") >= batch.start) & (batch.horizon > 0)
        if batch.gate is not None:
            may &= ~gates.without_estimate(sums)
        self.opens = gates.openness(gates.coherence(sums), batch.gate, gates.noise_floor(cov, var))
        self.weights = gates.plain_weights(torch.tensor(batch.seen, device="cpu"), batch.beta)
        if batch.gate is not None:
            self.weights = torch.maximum(self.weights, (gates.NEWEST * self.opens.square()).where(may, 0.0))
        self.norms = gates.averaged_norm(sums, self.weights)
        self.drift_sq = float(self.norms[self.finite].square().sum())
        retreats = gates.retreats(sums, self.opens).where(may, 0.0)
        furthest = self.opens * (self.longest / batch.every) * self.norms + retreats * sums[:, 1].sqrt()
        if batch.estimates is not None:  # what is jumped by is stored in the same dtype first
            furthest = torch.maximum(furthest, self.norms).where(furthest > 0, 0.0)
        self.overflow = gates.overflows(sums, furthest, [p.dtype for p in batch.params]) & may & (furthest > 0)
        self.opens = self.opens.where(may & ~self.overflow, 0.0)
        self.reach = self._reach()
        self.retreats = retreats.where(~self.overflow, 0.0)
        self.noise = gates.averaged_noise(cov, var, self.weights, batch.every, batch.momentum)

    def _reach(self) -> Reach:
        opened = self.opens > 0
        opens, weights, norms = self.opens[opened], self.weights[opened], self.norms[opened]
        along = (1 - weights) * self.sums[opened, 0] + weights * self.sums[opened, 1]  # <D, V>, V the new estimate
        gated_sq = float((opens * norms).square().sum())
        every = self.batch.every
        way = float((opens * along).sum()) / every
        return Reach(way, gated_sq / every**2, gated_sq, self.drift_sq, float(opened.sum()))

    def end_cycle(self) -> Outcome:
        """The new estimates and, as anchors, the weights after the retreat; the tensors that are refused stay."""
        batch, estimates = self.batch, self.batch.estimates
        reset = [] if estimates is None else (~self.sums[:, 2].isfinite()).nonzero().flatten().tolist()
        for i in reset:
            assert estimates is not None
            estimates[i].zero_()
        params, anchors = batch.params, batch.anchors
        if not bool(self.finite.all()):
            chosen = self.finite.nonzero().flatten().tolist()
            for i in set(range(len(params))) - set(chosen):
                anchors[i].copy_(params[i])
            params, anchors = [params[i] for i in chosen], [anchors[i] for i in chosen]
            estimates = None if estimates is None else [estimates[i] for i in chosen]
            self.lists = _lists(params, anchors, estimates)
        self.params, self.anchors = params, anchors
        if batch.differentiable:  # what autograd has seen must not be written: the jump is added at the end
            self.landed = [p.detach().clone() for p in params]
            self.lists = _lists(self.landed, anchors, estimates)
        if estimates is not None:
            self.lists.retreat_(self.retreats[self.finite], self.weights[self.finite])
        before = torch.tensor(batch.noise, dtype=torch.float64, device="cpu")
        noise = torch.stack(self.noise, 1).where(self.finite[:, None], before)
        noise[reset] = 0.0
        return Outcome(list(map(tuple, noise.tolist())), reset)

    def move(self, length: float) -> None:
        """Write the weights of this length, or of N where that is shorter."""
        if self.batch.estimates is not None:
            self.lists.trial_(self.opens[self.finite] * (min(length, self.longest) / self.batch.every))

    def finish(self) -> None:
        """Begin the next cycle at the weights as they are."""
        if self.batch.estimates is None:
            self.lists.jump_(self.opens[self.finite] * (self.batch.horizon / self.batch.every))
        else:
            self.lists.anchor_()
        if self.batch.differentiable:  # a constant to autograd: gradients pass through it unchanged
            with torch.enable_grad():
                for p, w in zip(self.params, self.landed):
                    p.add_(w - p.detach())
            for p, a in zip(self.params, self.anchors):
                a.copy_(p.detach())


def _together(jumps: Sequence[_Jump]) -> Reach:
    return Reach(*(sum(each) for each in zip((0.0,) * 5, *(astuple(jump.reach) for jump in jumps))))


def _lists(params: Sequence[Tensor], anchors: Sequence[Tensor], estimates: Sequence[Tensor] | None) -> TensorLists:
    return TensorLists(local(params), local(anchors), None if estimates is None else local(estimates))


@torch.no_grad()
def end_cycle(
    batches: Sequence[CycleBatch], tables: list[TensorLists], longest: float, choose: Choose
) -> tuple[JumpReport, Length | None, list[Outcome]]:
    """End the cycle of every tensor of `batches`: decide how far each of them may jump, then jump and re-anchor.

    Each tensor has a gate of its own. As far as it is shut the tensor retreats, by up to half of a drift that is large
    beside its weights. A tensor whose drift, estimate or weights are not finite, or whose longest jump could leave its
    dtype's range, is refused: it keeps its weights, gets a new anchor, and a RuntimeWarning says so.

    Args:
        batches: at least one, none empty; floating or complex tensors of any shapes, layouts and devices, DTensors too.
            Their params, anchors and estimates are written in place.
        tables: what this function left there when it was last called, or empty; written in place.
        longest: no length is tried beyond it, but for batches that are not limited.
        choose: says how far to jump, given a function that moves the weights to a length, any number of times, and the
            reach of what is moved. Asked wherever a batch is limited, also if none of its tensors may jump: those of
            another rank may. None: nothing jumps anywhere.

    Returns:
        What was done; the length chosen, None where none was; what became of each batch.

    Source: as :class:`~extraopt.ExtraAdam`; for one batch, `kernels/reference.py` says the same in float64.
    """
    tables[:] = _tabulated(batches, tables)
    all_sums = [sum_over_shards(own.sums(), batch.params) for batch, own in zip(batches, tables)]
    gated = torch.cat([s for batch, s in zip(batches, all_sums) if batch.gate is not None] or all_sums)
    cosine = float(gates.coherence(gated[gates.finite(gated)].sum(0, keepdim=True)))

    jumps = [_Jump(batch, own, sums, longest) for batch, own, sums in zip(batches, tables, all_sums)]
    outcomes = [jump.end_cycle() for jump in jumps]
    opened = [jump for jump in jumps if jump.batch.limited and bool(jump.opens.any())]
    for jump in jumps:
        if jump not in opened:
            jump.move(0.0 if jump.batch.limited else math.inf)

    def move(length: float) -> None:
        for jump in opened:
            jump.move(length)

    with signals_wait():
        try:
            chosen = choose(move, _together(opened)) if any(batch.limited for batch in batches) else None
            if chosen:
                move(chosen.steps)
        except BaseException:
            move(0.0)
            raise
        for jump in jumps:
            jump.finish()

    weight_sq, jumped, length, refused = 0.0, 0, 0.0, []
    for jump in jumps:
        own_length = jump.longest if not jump.batch.limited else min(chosen.steps if chosen else 0.0, jump.longest)
        if own_length and bool(jump.opens.any()):
            jumped += int((jump.opens > 0).sum())
            length = max(length, own_length)
        weight_sq += float(jump.sums[jump.finite, 3].sum())
        refused += [jump.batch.params[i] for i in (~jump.finite | jump.overflow).nonzero().flatten().tolist()]
    step = max(max(batch.steps) for batch in batches)
    if refused:
        warnings.warn(
            f"extraopt: {len(refused)} of {sum(len(batch.params) for batch in batches)} tensors did not jump at "
            f"applied step {step}: a weight, anchor or drift is not finite, or the jump could overflow (first: shape "
            f"{tuple(refused[0].shape)}, {refused[0].dtype}). Their weights were left as they are and re-anchored.",
            RuntimeWarning,
            stacklevel=2,
        )
    gate, drift_norm = _together(jumps).gate, sum(jump.drift_sq for jump in jumps) ** 0.5
    kl, fall = (chosen.kl, chosen.fall) if chosen else (math.nan, math.nan)
    report = JumpReport(step, length, gate, cosine, kl, fall, drift_norm, weight_sq**0.5, jumped, len(refused))
    return report, chosen, outcomes
