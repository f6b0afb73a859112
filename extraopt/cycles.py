"""What ExtraAdam and Extra share: the cycles of an optimizer's parameters, as entries of its state and its groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .cycle import JumpReport, Lane, averaging, end_cycle, keeps_drift, new_drift, take_back, to_host
from .rollback import EMPTY, GROW, SHRINK, add, mean_over_ranks, worse


def group_keeps_drift(group: Mapping[str, Any]) -> bool:
    """Whether the rule of this group needs an estimate besides the anchor."""
    return keeps_drift(group["extra_every"], group["extra_steps"], group["extra_beta"], group["extra_gate"])


def offload(state: dict[str, Any]) -> None:
    """Bring a parameter's anchor and estimate back to host memory, from where trainers and loaders may take them."""
    for key in ("extra_anchor", "extra_drift"):
        if key in state and state[key].is_cuda:
            state[key] = to_host(state[key])


def stands(group: Mapping[str, Any]) -> bool:
    """Whether a step of this group moves nothing: its learning rate is 0, as far as that can be told without a wait."""
    lr = group.get("lr")  # None where the optimizer finds its own
    return lr is not None and (not isinstance(lr, Tensor) or lr.is_cpu) and float(lr) == 0


def momentum_of(group: Mapping[str, Any]) -> float:
    """The decay of an optimizer's momentum, by the names under which they keep it, in [0, 1).

    Without any, steps owe nothing to those before; with 1 or more they never forget, for which no sum would end.
    """
    betas = group.get("betas")
    momentum = float(betas[0] if betas else group.get("momentum") or group.get("beta1") or 0.0)
    return min(max(momentum, 0.0), 0.9999) if momentum == momentum else 0.0


class Cycles:
    """A mixin for torch optimizers whose parameters have `extra_anchor`, `extra_origin` and, mostly, `extra_drift`."""

    state: Any
    param_groups: list[dict[str, Any]]
    _last_jump: list[JumpReport]  # written in place, never rebound: wrappers that take on a class share what it holds

    def _anchored_steps(self) -> Iterator[tuple[dict[str, Any], dict[Tensor, int]]]:
        """Each group with those of its parameters that have an anchor, and their applied steps."""
        raise NotImplementedError

    def _moving(self, params: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Entered around what moves these parameters from outside a step."""
        return nullcontext()

    def _phases_changed(self) -> None:
        """Cycles have begun where no count of steps would have it."""

    def _origin(self, p: Tensor) -> int:
        origin: int = self.state[p]["extra_origin"]
        return origin if origin >= 0 else ~origin

    def _begin(self, p: Tensor, every: int, step: int, taken_in: int) -> None:
        # A new cycle begins here. The estimate goes on, so the drifts that it has taken in still count as cycles since
        # the origin, as many as fit.
        cycles = (step - self._origin(p)) // every + taken_in
        self.state[p]["extra_origin"] = max(step - cycles * every, step % every)

    def _lane(self, group: dict[str, Any], steps: Mapping[Tensor, int]) -> list[Lane]:
        if not steps:
            return []
        states = [self.state[p] for p in steps]
        if group["extra_offload"]:
            for state in states:
                offload(state)
        drifts = None
        if group_keeps_drift(group):
            for p, state in zip(steps, states):
                if "extra_drift" not in state:
                    state["extra_drift"] = new_drift(p, group["extra_offload"])
            drifts = [state["extra_drift"] for state in states]
        return [
            Lane(
                params=list(steps),
                anchors=[state["extra_anchor"] for state in states],
                drifts=drifts,
                steps=list(steps.values()),
                seen=[(step - self._origin(p) - 1) // group["extra_every"] for p, step in steps.items()],
                every=group["extra_every"],
                horizon=group["extra_steps"] * group["extra_scale"],
                beta=averaging(group["extra_every"], group["extra_steps"], group["extra_beta"]),
                gate=group["extra_gate"],
                start=group["extra_start"],
                momentum=momentum_of(group),
                differentiable=group.get("differentiable") is True,
            )
        ]

    def _end(self, lanes: list[Lane]) -> None:
        with self._moving([p for lane in lanes for p in lane.params]):
            self._last_jump[:] = [end_cycle(lanes)]
        for lane in lanes:
            for i in lane.forgotten:
                self.state[lane.params[i]]["extra_origin"] = lane.steps[i]
        for group in self.param_groups:
            group["extra_scale"] = min(1.0, group["extra_scale"] * GROW)
        first = self.param_groups[0]
        before, after = first["extra_reports"][:3], first["extra_reports"][3:]
        if not before[0] and not after[0]:
            return  # nobody reports; a compiled step, which watches every number in the state, need not know
        first["extra_reports"] = (*after, *EMPTY)  # checkpoints may give a list back
        for p in (p for group in self.param_groups for p in group["params"]):
            if "extra_ratio" in self.state.get(p, ()):  # what is reported from now on says nothing about older jumps
                self.state[p]["extra_ratio"] = 0.0
        for lane in lanes:
            for p, ratio in zip(lane.params, lane.ratios if lane.drifts is not None else ()):
                self.state[p]["extra_ratio"] = ratio

    @property
    def last_jump(self) -> JumpReport | None:
        """What the last end of a cycle did in this process, or None: see :class:`~extraopt.cycle.JumpReport`."""
        return self._last_jump[0] if self._last_jump else None

    @torch.no_grad()
    def jump(self) -> JumpReport | None:
        """End the running cycle of every parameter now, and start the next one here.

        For trainers that know a better moment than a count of steps: before weights are sent to an inference engine,
        at the end of an RL iteration. The drift is that of the steps taken since the anchor, so a cycle that is ended
        after a part of its k steps jumps about that part as far. Parameters without an applied step since their anchor
        are left alone: calling this twice, or right after a cycle ended by itself, does nothing.

        Returns:
            What was done, or None where there was nothing to do.
        """
        lanes = []
        for group, steps in self._anchored_steps():
            begun = {p: n for p, n in steps.items() if (n - self._origin(p)) % group["extra_every"]}
            lanes += self._lane(group, begun)
            for p, step in begun.items():
                self._begin(p, group["extra_every"], step, taken_in=1)
        self._phases_changed()
        if not lanes:
            return None
        self._end(lanes)
        return self.last_jump

    @torch.no_grad()
    def reset_anchor(self) -> None:
        """Start a new cycle at the weights as they are now, without jumping.

        Call it after weights were edited from outside (best model loaded, averaged weights swapped in, pruning): else
        the next jump extrapolates across the edit. The drift estimate is kept; the gate judges whether it still holds.
        """
        for group, steps in self._anchored_steps():
            for p, step in steps.items():
                self.state[p]["extra_anchor"].copy_(p)
                self._begin(p, group["extra_every"], step, taken_in=0)
                if "extra_ratio" in self.state[p]:  # weights from elsewhere have no jump to take back
                    self.state[p]["extra_ratio"] = 0.0
        self._phases_changed()

    @torch.no_grad()
    def report(self, metric: float) -> bool:
        """Tell how good the model is now, so that a jump that made it worse can be taken back.

        Call it as often as there is news: with an evaluation's score, or, before ``step``, with the mean reward of the
        batch that the step is about to learn from, or the entropy of the policy that sampled it, which tells sooner: a
        policy that is too sure no longer samples what it has yet to learn. Where the mean since the last jump lies
        below that of the cycle before it by more than 3 standard errors (of at least 3 values each), the weights move
        back by the jump, the steps since are kept, and the horizon is halved; it recovers by a tenth with each cycle
        that goes well.

        Args:
            metric (float): higher is better. Under ``torch.distributed`` every rank has to call, and the mean over
                ranks counts. What is not finite is left out.

        Returns:
            bool: whether a jump was taken back.

        Raises:
            RuntimeError: the rule keeps no estimate to go back by (``extra_beta=0, extra_gate=None``).

        Warns:
            RuntimeWarning: a jump was taken back.
        """
        if not all(group_keeps_drift(group) for group in self.param_groups):
            raise RuntimeError("report() needs the drift estimate, which extra_beta=0, extra_gate=None does not keep.")
        device = next(p.device for group in self.param_groups for p in group["params"])
        value = mean_over_ranks(metric, device)
        first = self.param_groups[0]
        windows = tuple(first["extra_reports"])
        before, after = windows[:3], windows[3:]
        if math.isfinite(value):
            after = add(after, value)
        first["extra_reports"] = before + after
        moved = [p for _, steps in self._anchored_steps() for p in steps if self.state[p].get("extra_ratio")]
        if not moved or not worse(before, after):
            return False
        states = [self.state[p] for p in moved]
        anchors, drifts, ratios = ([s[f"extra_{key}"] for s in states] for key in ("anchor", "drift", "ratio"))
        with self._moving(moved):
            take_back(moved, anchors, drifts, ratios)
        for state in states:
            state["extra_ratio"] = 0.0
        for group in self.param_groups:
            group["extra_scale"] *= SHRINK
        first["extra_reports"] = before + EMPTY
        warnings.warn(
            f"ExtraAdam: the metric fell from {before[1]:.4g} to {after[1]:.4g} after the last jump, which was taken "
            f"back. Jumps are now {first['extra_scale']:.0%} as long.",
            RuntimeWarning,
            stacklevel=2,
        )
        return True
