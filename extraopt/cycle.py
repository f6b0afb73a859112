"""One cycle over lists of tensors: when it is due, drift, jump, re-anchor. Knows no optimizer class."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor

from . import gate as gates
from . import kernels


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


@dataclass
class Lane:
    """Tensors whose cycle ends now and that share their knobs.

    Attributes:
        steps: applied optimizer steps of each tensor.
        seen: drifts that each tensor's estimate has taken in so far.
        momentum: decay of the optimizer's momentum, which makes drifts agree where nothing else does.
        ratios: what `end_cycle` made of it: each tensor's jump as a multiple of its estimate.
        forgotten: likewise, the tensors whose estimate was not finite and is zeros again, by index.
    """

    params: list[Tensor]
    anchors: list[Tensor]
    drifts: list[Tensor] | None
    steps: list[int]
    seen: list[int]
    every: int
    horizon: float
    beta: float
    gate: float | None
    start: int
    momentum: float
    differentiable: bool = False
    ratios: list[float] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)


def new_anchor(p: Tensor, offload: bool = False) -> Tensor:
    """A copy of `p`: same shape, dtype and strides (a DTensor of one), on its device or, offloaded, in host memory."""
    return to_host(p.detach()) if offload and p.is_cuda else p.detach().clone(memory_format=torch.preserve_format)


def new_drift(p: Tensor, offload: bool = False) -> Tensor:
    """An estimate that knows nothing yet: zeros like `p`, on its device or, offloaded, in host memory."""
    if offload and p.is_cuda:
        return to_host(p.detach()).zero_()
    return torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)


def to_host(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """A copy in pinned host memory, of the same strides; of a DTensor, its local part there."""
    return torch.empty_like(t, dtype=dtype, device="cpu", pin_memory=torch.cuda.is_available()).copy_(t)


def averaging(every: int, horizon: int, beta: float | None) -> float:
    """The b that is used: `beta`, or max(0, 1 - k / N) for None."""
    if beta is not None:
        return beta
    return max(0.0, 1 - every / horizon) if horizon else 0.0


def keeps_drift(every: int, horizon: int, beta: float | None, gate: float | None) -> bool:
    """Whether the rule needs an estimate besides the anchor: not for the paper's (b = 0, no gate)."""
    return gate is not None or averaging(every, horizon, beta) > 0


@dataclass
class Countdown:
    """Tells, without reading every step counter, that no cycle of a list of tensors can have ended yet.

    Attributes:
        counters: the 0-dim step counters of the list.
        every: k when the countdown began.
        first: what the first counter stood at then.
        left: how many more applied steps the list needed then until the first of its cycles would end.
        calls: optimizer steps since then; some may have been skipped.
    """

    counters: list[Tensor]
    every: int
    first: int
    left: int
    calls: int = 0

    def running(self, counters: Sequence[Tensor], every: int) -> bool:
        """Whether all cycles of the list surely go on after one more call. Never waits for a device."""
        if every != self.every or len(counters) != len(self.counters) or not all(map(is_, counters, self.counters)):
            return False
        self.calls += 1
        # on a CPU reading one counter is free, and notices skipped steps and edits from outside
        elapsed = int(counters[0]) - self.first if counters[0].is_cpu else self.calls
        return 0 <= elapsed < self.left


def read_counters(counters: Sequence[Tensor]) -> list[int]:
    """The values of 0-dim step counters; one transfer for all that live on a device."""
    if all(c.is_cpu for c in counters):
        return [int(c) for c in counters]
    return [int(c) for c in torch.stack([c.to(counters[0].device) for c in counters]).tolist()]


def _sum_over_shards(sums: Tensor, params: Sequence[Any]) -> Tensor:
    """Add up the sums of tensors that are sharded over ranks, so that every rank decides on the whole tensor.

    One all-reduce for each dimension of each mesh: [tensors of the mesh, 4] float64.
    """
    meshes: dict[Any, list[int]] = {}
    for i, p in enumerate(params):
        if _is_dtensor(p):
            meshes.setdefault(p.device_mesh, []).append(i)
    for mesh, indices in meshes.items():
        for dim in range(mesh.ndim):
            split = torch.tensor([not params[i].placements[dim].is_replicate() for i in indices])
            if mesh.size(dim) == 1 or not split.any():
                continue
            total = sums[indices].to(mesh.device_type)
            torch.distributed.all_reduce(total, group=mesh.get_group(dim))
            sums[indices] = torch.where(split[:, None], total.cpu(), sums[indices])
    return sums


def _is_dtensor(t: Any) -> bool:
    return hasattr(t, "to_local")  # importing the class would double the time of `import extraopt`


def _local(tensors: Sequence[Any]) -> list[Tensor]:
    return [t.to_local() if _is_dtensor(t) else t for t in tensors]


def _lists(params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor] | None) -> kernels.Lists:
    return kernels.Lists(_local(params), _local(anchors), None if drifts is None else _local(drifts))


@torch.no_grad()
def end_cycle(lanes: Sequence[Lane]) -> JumpReport:
    """End the cycle of every tensor of `lanes`: decide how far each of them may jump, then jump and re-anchor.

    Each tensor has a gate of its own. As far as it is shut the tensor retreats: it takes back up to half of a drift
    that is large beside its weights.
    A tensor whose drift, estimate or weights are not finite, or whose jump could leave its dtype's range, is refused:
    it keeps its weights, gets a new anchor, and a RuntimeWarning says so.

    Args:
        lanes: at least one, none empty; floating or complex tensors of any shapes, layouts and devices, DTensors too.
            Their params, anchors and drifts are written in place, what they were refused or jumped anew.

    Returns:
        What was done, over all lanes.

    Source: as :class:`~extraopt.ExtraAdam`; for one lane, `kernels/reference.py` says the same in float64.
    """
    lists = [_lists(lane.params, lane.anchors, lane.drifts) for lane in lanes]
    sums = [_sum_over_shards(own.sums(), lane.params) for lane, own in zip(lanes, lists)]
    watched = [s for lane, s in zip(lanes, sums) if lane.gate is not None] or sums
    every_sum = torch.cat(watched)
    cosine = float(gates.coherence(every_sum[gates.finite(every_sum)].sum(0, keepdim=True)))

    gated_sq, drift_sq, weight_sq, jumped, refused = 0.0, 0.0, 0.0, 0, []
    for lane, own, s in zip(lanes, lists, sums):
        finite = gates.finite(s)
        may = finite & (torch.tensor(lane.steps) >= lane.start) & (lane.horizon > 0)
        if lane.gate is not None:
            may &= ~gates.unknown(s)
        judged = {
            n: (gates.momentum_coherence(lane.every, lane.beta, lane.momentum, max(1, n)), gates.growth(n, lane.gate))
            for n in set(lane.seen)
        }
        floor, grown = torch.tensor([judged[n] for n in lane.seen], dtype=torch.float64).unbind(1)
        g = gates.openness(gates.coherence(s), lane.gate, floor)
        ratios = (g * grown * lane.horizon / lane.every).where(may, 0.0)
        retreats = gates.retreats(s, g).where(may, 0.0)
        norms = gates.averaged_norm(s, lane.beta)
        jumps = ratios * norms + retreats * s[:, 1].sqrt()
        overflow = gates.overflows(s, jumps, [p.dtype for p in lane.params]) & (jumps > 0)
        ratios[overflow] = retreats[overflow] = 0.0
        lane.ratios = ratios.tolist()
        lane.forgotten = [] if lane.drifts is None else (~s[:, 2].isfinite()).nonzero().flatten().tolist()
        _apply(lane, own, finite.tolist(), lane.ratios, retreats.tolist())

        gated_sq += float((norms * g)[ratios > 0].square().sum())
        drift_sq += float(norms[finite].square().sum())
        weight_sq += float(s[finite, 3].sum())
        jumped += int((ratios > 0).sum())
        refused += [p for p, bad in zip(lane.params, (~finite | overflow).tolist()) if bad]

    step = max(max(lane.steps) for lane in lanes)
    if refused:
        warnings.warn(
            f"ExtraAdam: {len(refused)} of {sum(len(lane.params) for lane in lanes)} tensors did not jump at applied "
            f"step {step}: a weight, anchor or drift is not finite, or the jump could overflow (first: shape "
            f"{tuple(refused[0].shape)}, {refused[0].dtype}). Their weights were left as they are and re-anchored.",
            RuntimeWarning,
            stacklevel=2,
        )
    gate = (gated_sq / drift_sq) ** 0.5 if drift_sq > 0 else 0.0
    return JumpReport(step, gate, cosine, drift_sq**0.5, weight_sq**0.5, jumped, len(refused))


def _apply(lane: Lane, lists: kernels.Lists, finite: list[bool], ratios: list[float], retreats: list[float]) -> None:
    params, anchors, drifts = lane.params, lane.anchors, lane.drifts
    if drifts is not None:
        for i in lane.forgotten:
            drifts[i].zero_()
    if not all(finite):
        chosen = [i for i, ok in enumerate(finite) if ok]
        for i in set(range(len(finite))) - set(chosen):
            anchors[i].copy_(params[i])
        params, anchors = [params[i] for i in chosen], [anchors[i] for i in chosen]
        ratios, retreats = [ratios[i] for i in chosen], [retreats[i] for i in chosen]
        drifts = None if drifts is None else [drifts[i] for i in chosen]
        lists = _lists(params, anchors, drifts)
    if not lane.differentiable:
        lists.jump_(ratios, retreats, 1 - lane.beta)
        return
    # the jump is a constant to autograd: gradients pass through it unchanged
    landed = [p.detach().clone() for p in params]
    _lists(landed, anchors, drifts).jump_(ratios, retreats, 1 - lane.beta)
    with torch.enable_grad():
        for p, w in zip(params, landed):
            p.add_(w - p.detach())
    for p, a in zip(params, anchors):
        a.copy_(p.detach())


@torch.no_grad()
def take_back(
    params: Sequence[Tensor], anchors: Sequence[Tensor], drifts: Sequence[Tensor], ratios: Sequence[float]
) -> None:
    """Undo a jump, up to rounding, and keep the steps since: each W and A moves by -ratio * V, in place.

    Only as long as V is what the jump used: before the next cycle ends. A tensor that is not finite, or would leave its
    dtype's range, stays where it is.
    """
    sums = _sum_over_shards(_lists(params, anchors, drifts).sums(), params)
    jumps = torch.tensor(ratios, dtype=torch.float64) * sums[:, 2].sqrt()
    fits = gates.finite(sums) & ~gates.overflows(sums, jumps, [p.dtype for p in params])
    for p, a, v, ratio, ok in zip(_local(params), _local(anchors), _local(drifts), ratios, fits.tolist()):
        for t in (p, a) if ratio and ok else ():
            wide = torch.promote_types(t.dtype, torch.float32)  # one rounding
            t.copy_(torch.sub(t.to(wide), v.to(t.device, wide), alpha=ratio))
