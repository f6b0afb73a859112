"""What ExtraAdam and Extra share: the cycles of an optimizer's parameters, as entries of its state and its groups."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .extrapolation import CycleBatch, JumpReport, averaging, end_cycle, keeps_estimate, roll_back
from .rollback import EMPTY, GROW, SHRINK, add, mean_over_ranks, worse
from .schedule import Schedule
from .state import new_anchor, new_estimate, offload


def group_keeps_estimate(group: Mapping[str, Any]) -> bool:
    """Whether the rule of this group needs an estimate besides the anchor."""
    return keeps_estimate(group["extra_every"], group["extra_steps"], group["extra_beta"], group["extra_gate"])


def learning_rate_is_zero(group: Mapping[str, Any]) -> bool:
    """Whether a step of this group moves nothing, as far as that can be told without a wait."""
    lr = group.get("lr")  # None where the optimizer finds its own
    return lr is not None and (not isinstance(lr, Tensor) or lr.is_cpu) and float(lr) == 0


def momentum_of(group: Mapping[str, Any]) -> float:
    """The decay of an optimizer's momentum, by the names under which they keep it, in [0, 1).

    Without any, steps owe nothing to those before; with 1 or more they never forget, for which no sum would end.
    """
    betas = group.get("betas")
    momentum = float(betas[0] if betas else group.get("momentum") or group.get("beta1") or 0.0)
    return min(max(momentum, 0.0), 0.9999) if momentum == momentum else 0.0


_PROFILED = Optimizer.profile_hook_step(len).__code__


def unhooked_step(kind: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """The step of a class of optimizers without the hooks and the profiler's range that torch puts around it.

    Those of the optimizer that calls it are running already.
    """
    step: Any = kind.step
    return step.__wrapped__ if getattr(step, "__code__", None) is _PROFILED else step


class CycleMixin:
    """A mixin for torch optimizers whose parameters have `extra_anchor`, `extra_origin` and, mostly, `extra_drift`."""

    state: Any
    param_groups: list[dict[str, Any]]
    # Both are written in place, never rebound: wrappers that take on a class share what it holds.
    _last_jump: list[JumpReport]
    _schedule: Schedule

    def _anchored_steps(self) -> Iterator[tuple[dict[str, Any], dict[Tensor, int]]]:
        """Each group with those of its parameters that have an anchor, and their applied steps."""
        raise NotImplementedError

    def _moving(self, params: Iterable[Tensor]) -> AbstractContextManager[None]:
        """Entered around what moves these parameters from outside a step."""
        return nullcontext()

    def _applied_steps(self, p: Tensor) -> int:
        """The steps of a parameter without an anchor that the optimizer has counted, 0 where it counts none."""
        raise NotImplementedError

    def _begin_cycles(self, stepped: Iterable[Iterable[Tensor]]) -> dict[Tensor, dict[str, Any]]:
        """What has to be known of the weights before a step.

        Args:
            stepped: the parameters of each group that the step will move.

        Returns:
            The entries of parameters that begin their first cycle. They may join the state only after the step: most
            optimizers set up their own entries where they find none at all.
        """
        fresh: dict[Tensor, dict[str, Any]] = {}
        for group, params in zip(self.param_groups, stepped):
            # A step with lr 0 moves nothing, but it may be the one by which torch.distributed.checkpoint fills a fresh
            # state, before weights are loaded. Then the first step that moves takes the anchor.
            still = learning_rate_is_zero(group)
            for p in params:
                state = self.state.get(p, {})
                if "extra_anchor" in state and "extra_origin" in state:
                    if p in self._schedule.waiting and not still:
                        self._schedule.waiting.remove(p)
                        state["extra_anchor"].copy_(p.detach())
                elif group["extra_steps"]:
                    self._schedule.ended.pop(p, None)
                    fresh[p] = {
                        "extra_anchor": new_anchor(p, group["extra_offload"]),
                        "extra_origin": self._applied_steps(p),
                    }
                    if still:
                        self._schedule.waiting.add(p)
                if group["extra_steps"] and "extra_drift" not in state and group_keeps_estimate(group):
                    entries = {"extra_drift": new_estimate(p, group["extra_offload"]), "extra_ratio": 0.0}
                    fresh[p] = fresh.get(p, {}) | entries
        return fresh

    def _join(self, fresh: dict[Tensor, dict[str, Any]]) -> None:
        for p, entries in fresh.items():
            self.state[p].update(entries)

    def _restart(self, p: Tensor, every: int, step: int, taken_in: int) -> None:
        # A new cycle begins here. The estimate goes on, so the drifts that it has taken in still count as cycles since
        # the origin, as many as fit.
        state = self.state[p]
        cycles = (step - state["extra_origin"]) // every + taken_in
        state["extra_origin"] = max(step - cycles * every, step % every)
        self._schedule.waiting.discard(p)

    def _batches(self, due: Iterable[tuple[dict[str, Any], Mapping[Tensor, int]]]) -> list[CycleBatch]:
        """Parameters whose cycles end now, with their applied steps: one batch for all of the same hyperparameters."""
        batches: dict[tuple[Any, ...], CycleBatch] = {}
        for group, steps in due:
            if not steps:
                continue
            every, horizon = group["extra_every"], group["extra_steps"] * group["extra_scale"]
            beta = averaging(every, group["extra_steps"], group["extra_beta"])
            rule = every, horizon, beta, group["extra_gate"], group["extra_start"], momentum_of(group)
            rule += (group.get("differentiable") is True,)
            batch = batches.get(rule)
            if batch is None:
                batch = batches[rule] = CycleBatch([], [], [] if group_keeps_estimate(group) else None, [], [], *rule)
            for p, step in steps.items():
                state = self.state[p]
                if group["extra_offload"]:
                    offload(state)
                batch.params.append(p)
                batch.anchors.append(state["extra_anchor"])
                batch.steps.append(step)
                batch.seen.append((step - state["extra_origin"] - 1) // every)
                if batch.estimates is not None:
                    if "extra_drift" not in state:
                        state["extra_drift"] = new_estimate(p, group["extra_offload"])
                    batch.estimates.append(state["extra_drift"])
        return list(batches.values())

    def _end(self, batches: list[CycleBatch]) -> None:
        with self._moving([p for batch in batches for p in batch.params]):
            report, outcomes = end_cycle(batches, self._schedule.tables)
        self._last_jump[:] = [report]
        for batch, outcome in zip(batches, outcomes):
            for i in outcome.reset:
                self.state[batch.params[i]]["extra_origin"] = batch.steps[i]
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
        for batch, outcome in zip(batches, outcomes):
            for p, ratio in zip(batch.params, outcome.ratios if batch.estimates is not None else ()):
                self.state[p]["extra_ratio"] = ratio

    def _phases_changed(self) -> None:
        """Cycles have begun where no count of steps would have it: none that was just ended may end again."""
        self._schedule.reread()
        for _, steps in self._anchored_steps():
            self._schedule.ended.update(steps)

    @property
    def last_jump(self) -> JumpReport | None:
        """What the last end of a cycle did in this process, or None: see :class:`~extraopt.JumpReport`."""
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
        begun = []
        for group, steps in self._anchored_steps():
            every = group["extra_every"]
            begun.append((group, {p: n for p, n in steps.items() if (n - self.state[p]["extra_origin"]) % every}))
        batches = self._batches(begun)
        for group, steps in begun:
            for p, step in steps.items():
                self._restart(p, group["extra_every"], step, taken_in=1)
        self._phases_changed()
        if not batches:
            return None
        self._end(batches)
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
                self._restart(p, group["extra_every"], step, taken_in=0)
                if "extra_ratio" in self.state[p]:  # weights from elsewhere have no jump to roll back
                    self.state[p]["extra_ratio"] = 0.0
        self._phases_changed()

    @torch.no_grad()
    def report(self, metric: float) -> bool:
        """Tell how good the model is now, so that a jump that made it worse can be rolled back.

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
            bool: whether a jump was rolled back.

        Raises:
            RuntimeError: the rule keeps no estimate to go back by (``extra_beta=0, extra_gate=None``).

        Warns:
            RuntimeWarning: a jump was rolled back.
        """
        if not all(group_keeps_estimate(group) for group in self.param_groups):
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
            roll_back(moved, anchors, drifts, ratios)
        for state in states:
            state["extra_ratio"] = 0.0
        for group in self.param_groups:
            group["extra_scale"] *= SHRINK
        first["extra_reports"] = before + EMPTY
        warnings.warn(
            f"extraopt: the metric fell from {before[1]:.4g} to {after[1]:.4g} after the last jump, which was rolled "
            f"back. Jumps are now {first['extra_scale']:.0%} as long.",
            RuntimeWarning,
            stacklevel=2,
        )
        return True
