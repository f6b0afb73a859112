"""What ExtraAdam and Extra share: the cycles of an optimizer's parameters, as entries of its state and its groups."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .extrapolation import CycleBatch, JumpReport, end_cycle
from .schedule import FAR, Schedule, Stepped
from .state import (
    forget_cycle,
    keeps_estimate,
    new_anchor,
    new_estimate,
    number,
    offload,
    read_numbers,
    whole,
    write_numbers,
)
from .trust import GROWTH, UNWATCHED, Length, Limits, Reach, TrustRegion


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


Ending = tuple[Tensor, dict[str, Any], int, int]  # a parameter, its state, its applied steps, its cycles' origin


def endings(pairs: Sequence[Stepped], steps: Sequence[int]) -> list[Ending]:
    """Parameters that have an anchor, with their states and applied steps, and what the states say of their origins."""
    origins = read_numbers([state for _, state in pairs], "extra_origin")
    return [(p, state, step, origin) for (p, state), step, origin in zip(pairs, steps, origins)]


def _noise(ends: Sequence[Ending]) -> list[tuple[float, float]]:
    states = [state for _, state, *_ in ends]
    if not all("extra_noise_cov" in state and "extra_noise_var" in state for state in states):
        states = [{"extra_noise_cov": 0.0, "extra_noise_var": 0.0, **state} for state in states]
    return list(zip(read_numbers(states, "extra_noise_cov"), read_numbers(states, "extra_noise_var")))


NAMED = 5  # parameters in one warning


def _name(group: Mapping[str, Any], i: int, p: Tensor) -> str:
    j = next(j for j, q in enumerate(group["params"]) if q is p)
    names = group.get("param_names") or []
    return str(names[j]) if len(names) == len(group["params"]) else f"parameter {j} in group {i}"


def _form(t: Tensor) -> str:
    return f"{tuple(t.shape)} {t.dtype} on {t.device}"


_PROFILED = Optimizer.profile_hook_step(len).__code__


def unhooked_step(kind: type[Optimizer]) -> Callable[[Optimizer], Any]:
    """The step of a class of optimizers without the hooks and the profiler's range that torch puts around it.

    Those of the optimizer that calls it are running already.
    """
    step: Any = kind.step
    plain: Callable[[Optimizer], Any] = step.__wrapped__ if getattr(step, "__code__", None) is _PROFILED else step
    return plain


class CycleMixin:
    """A mixin for torch optimizers whose parameters have an `extra_anchor`, `extra_origin`, mostly `extra_estimate`."""

    state: Any
    param_groups: list[dict[str, Any]]
    _counter = "step"  # key of a parameter's applied steps
    # Both are written in place, never rebound: wrappers that take on a class share what it holds.
    _last_jump: list[JumpReport]
    _schedule: Schedule
    _trust: TrustRegion

    def _forget(self) -> None:
        # Caches only, nothing here is needed for a correct resume; emptied in place where they are there already.
        self.__dict__.setdefault("_schedule", Schedule(self._counter)).forget()
        self.__dict__.setdefault("_last_jump", []).clear()
        if "_trust" not in self.__dict__:
            self._trust = TrustRegion()
            self._trust.quietly = not self.param_groups[0]["extra_watch"]
            if not self._trust.quietly:
                self.watch()
        self._trust.watch.armed = True  # the very next step may end a cycle of what was loaded

    def watch(
        self,
        model: nn.Module | None = None,
        *,
        logits: Callable[[Any], Tensor] | None = None,
        process_group: Any = None,
    ) -> None:
        """Let the trust region look at the outputs of this model.

        In the last step of a cycle the inputs of its training forward pass are remembered; within ``step`` the model
        runs on them again, in eval mode and without gradients, before the jump and at the lengths that are tried. All
        but the weights is afterwards as it was. ``extra_watch=True``, the default, is this call without arguments.

        Args:
            model (nn.Module, optional): the one that is trained, as it is called, or what DistributedDataParallel or
                ``torch.compile`` wraps. None finds it at its first training forward pass: the outermost module that is
                called and has most of the parameters (default: None)
            logits (callable, optional): of the model's output, float [..., V]; the distributions that must not change
                much. None takes ``.logits`` of an output of transformers, at the positions that have a label, or that
                the attention mask shows (default: None)
            process_group (ProcessGroup, optional): the ranks that train this model together. None takes that of the
                DistributedDataParallel around it or of its DTensors (default: None)

        Warns:
            RuntimeWarning: at the end of a cycle, where the model can't be watched; says why and what to do. Jumps are
                then short.
        """
        self._trust.process_group, self._trust.quietly = process_group, False
        self._trust.watch.own = lambda: {id(p) for group in self.param_groups for p in group["params"]}
        if model is None:
            self._trust.watch.find(logits)
        else:
            self._trust.watch.attach(model, logits)

    def unwatch(self) -> None:
        """Take the hook off the model again; jumps are then short."""
        self._trust.watch.detach()
        self._trust.quietly = True

    def _anchored_steps(self) -> Iterator[tuple[dict[str, Any], list[Ending]]]:
        """Each group with those of its parameters that have an anchor."""
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
        misfits: list[str] = []
        for i, (group, params) in enumerate(zip(self.param_groups, stepped)):
            # A step with lr 0 moves nothing, but it may be the one by which torch.distributed.checkpoint fills a fresh
            # state, before weights are loaded. Then the first step that moves takes the anchor.
            still = learning_rate_is_zero(group)
            for p in params:
                state = self.state.get(p, {})
                if "extra_anchor" in state and "extra_origin" in state and not whole(state, p):
                    if group["extra_steps"]:
                        misfits.append(f"{_name(group, i, p)} is {_form(p)}, its anchor {_form(state['extra_anchor'])}")
                    forget_cycle(state)
                if "extra_anchor" in state and "extra_origin" in state:
                    if p in self._schedule.waiting and not still:
                        self._schedule.waiting.remove(p)
                        state["extra_anchor"].copy_(p.detach())
                elif group["extra_steps"]:
                    self._schedule.ended.pop(id(p), None)
                    fresh[p] = {
                        "extra_anchor": new_anchor(p, group["extra_offload"]),
                        "extra_origin": self._applied_steps(p),
                    }
                    if still:
                        self._schedule.waiting.add(p)
                if group["extra_steps"] and "extra_estimate" not in state and keeps_estimate(group):
                    entries = {"extra_estimate": new_estimate(p, group["extra_offload"])}
                    fresh[p] = fresh.get(p, {}) | entries | {"extra_noise_cov": 0.0, "extra_noise_var": 0.0}
        if misfits:
            more = f"; and {len(misfits) - NAMED} more" if len(misfits) > NAMED else ""
            warnings.warn(
                f"extraopt: {'; '.join(misfits[:NAMED])}{more}. It was changed in mid-run: a new cycle starts there, "
                "without a jump across the change, and all others go on.",
                RuntimeWarning,
                stacklevel=4,
            )
        return fresh

    def _known(self) -> bool:
        """Whether no cycle begins with the next step: nothing has changed, and anchors are still their parameters'."""
        schedule = self._schedule
        if not schedule.unchanged(self.param_groups, self.state):
            schedule.reread()
            return False
        return schedule.same_tensors() or all(whole(state, p) for pairs in schedule.stepped for p, state in pairs)

    def _renew(self) -> None:
        """Begin a new cycle, as the next step would, where an anchor does not fit its parameter any more."""
        pairs_of = [[(p, self.state.get(p, {})) for p in group["params"]] for group in self.param_groups]
        unfit = [[p for p, state in pairs if "extra_anchor" in state and not whole(state, p)] for pairs in pairs_of]
        if any(unfit):
            self._join(self._begin_cycles(unfit))
            self._schedule.reread()

    def _join(self, fresh: dict[Tensor, dict[str, Any]]) -> None:
        for p, entries in fresh.items():
            self.state[p].update({k: v if isinstance(v, Tensor) else number(v, p) for k, v in entries.items()})

    def _restart(self, every: int, ends: list[Ending], taken_in: int) -> None:
        # New cycles begin here. Estimates go on, so the drifts that they have taken in still count as cycles since the
        # origin, as many as fit.
        cycles = [(step - origin) // every + taken_in for _, _, step, origin in ends]
        begun = [max(step - n * every, step % every) for (_, _, step, _), n in zip(ends, cycles)]
        params = [p for p, *_ in ends]
        write_numbers([state for _, state, *_ in ends], "extra_origin", begun, params)
        self._schedule.waiting.difference_update(params)

    def _end_those_due(self, stepped: list[list[Stepped]], steps: Sequence[int]) -> None:
        """End the cycles that are due, and remember for how many steps none can be.

        Args:
            stepped: of each group, the parameters that have an anchor and were just moved, with their states.
            steps: applied steps of all of these, one after the other.
        """
        everything = iter(endings(list(chain.from_iterable(stepped)), steps))
        left, due, before, ended, phases = FAR, [], self._schedule.ended, {}, set[int]()
        shortest = min((group["extra_every"] for group, pairs in zip(self.param_groups, stepped) if pairs), default=1)
        for group, pairs in zip(self.param_groups, stepped):
            every, ends = group["extra_every"], []
            for ending in islice(everything, len(pairs)):
                p, _, step, origin = ending
                elapsed = step - origin
                left = min(left, every - elapsed % every)
                phases.add(elapsed % shortest)
                if elapsed <= 0 or elapsed % every:
                    continue
                ended[id(p)] = step
                if before.get(id(p)) != step:  # else a step that was skipped, or is not counted any more
                    ends.append(ending)
            due.append((group, ends))
        found_inf = getattr(self, "found_inf", None)
        if any(ends for _, ends in due) and not (found_inf is not None and bool(found_inf)):
            self._end(self._batches(due), len(phases))
        self._schedule.ended = ended
        self._schedule.keep(self.param_groups, self.state, left, stepped, steps[0] if steps else 0)

    def _batches(
        self, due: Iterable[tuple[dict[str, Any], list[Ending]]]
    ) -> list[tuple[CycleBatch, list[dict[str, Any]]]]:
        """Parameters whose cycles end now and their states, in one batch for all of the same hyperparameters."""
        alike: dict[tuple[Any, ...], tuple[dict[str, Any], list[Ending]]] = {}
        parted = []
        for group, ends in due:
            if group["extra_kl"] is None or self._trust.watch.model is None:
                parted.append((group, group["extra_steps"], ends))
                continue
            seen = self._trust.watch.computes_with([p for p, *_ in ends])
            parted.append((group, group["extra_steps"], [end for end, of_model in zip(ends, seen) if of_model]))
            short = min(group["extra_steps"], int(UNWATCHED))  # of these the outputs say nothing
            parted.append((group, short, [end for end, of_model in zip(ends, seen) if not of_model]))
        for group, horizon, ends in parted:
            if not ends:
                continue
            for p, state, *_ in ends:
                if group["extra_offload"]:
                    offload(state)
                if keeps_estimate(group) and "extra_estimate" not in state:
                    state["extra_estimate"] = new_estimate(p, group["extra_offload"])
            rule = (
                group["extra_every"], horizon, group["extra_beta"], group["extra_gate"],
                group["extra_start"], group["extra_kl"] is not None, momentum_of(group),
                group.get("differentiable") is True,
            )  # fmt: skip
            alike.setdefault(rule, (group, []))[1].extend(ends)
        batches = []
        for rule, (group, ends) in alike.items():
            every, states = group["extra_every"], [state for _, state, *_ in ends]
            estimates, noise = None, [(0.0, 0.0)] * len(ends)
            if keeps_estimate(group):
                estimates, noise = [state["extra_estimate"] for state in states], _noise(ends)
            batch = CycleBatch(
                [p for p, *_ in ends],
                [state["extra_anchor"] for state in states],
                estimates,
                noise,
                [step for _, _, step, _ in ends],
                [(step - origin - 1) // every for _, _, step, origin in ends],
                *rule,
            )
            batches.append((batch, states))
        return batches

    def _end(self, due: list[tuple[CycleBatch, list[dict[str, Any]]]], phases: int) -> None:
        batches = [batch for batch, _ in due]
        params = [p for batch in batches for p in batch.params]
        groups = [group for group in self.param_groups if group["extra_kl"] is not None] or self.param_groups
        known = min(group["extra_length"] for group in groups)
        limits = Limits(
            max((batch.horizon for batch in batches if batch.limited), default=0),
            min(group["extra_kl"] or float("inf") for group in groups),
            min(group["extra_fall"] for group in groups),
        )

        def choose(move: Callable[[float], None], reach: Reach) -> Length | None:
            return self._trust.choose(move, reach, params, known, limits, phases)

        with self._moving(params):
            report, length, outcomes = end_cycle(batches, self._schedule.tables, max(GROWTH * known, UNWATCHED), choose)
        self._last_jump[:] = [report]
        if length is not None:
            for group in self.param_groups:
                group["extra_length"] = length.known
        for (batch, states), outcome in zip(due, outcomes):
            if batch.estimates is not None:
                for key, values in zip(("extra_noise_cov", "extra_noise_var"), zip(*outcome.noise)):
                    write_numbers(states, key, values, batch.params)
            for i in outcome.reset:
                write_numbers([states[i]], "extra_origin", [batch.steps[i]], [batch.params[i]])
        self._trust.watch.release()

    def _phases_changed(self) -> None:
        """Cycles have begun where no count of steps would have it: none that was just ended may end again."""
        self._schedule.reread()
        self._trust.watch.armed = True
        for _, ends in self._anchored_steps():
            self._schedule.ended.update((id(p), step) for p, _, step, _ in ends)

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
        are left alone: calling this twice, or right after a cycle ended by itself, does nothing. With a trust region it
        is no longer than the last length found, and than 20 steps: there are no inputs to try it on.

        Returns:
            What was done, or None where there was nothing to do.
        """
        self._renew()
        begun = []
        for group, ends in self._anchored_steps():
            every = group["extra_every"]
            begun.append((group, [end for end in ends if (end[2] - end[3]) % every]))
        batches = self._batches(begun)
        for group, ends in begun:
            self._restart(group["extra_every"], ends, taken_in=1)
        self._phases_changed()
        if not batches:
            return None
        self._end(batches, phases=0)
        return self.last_jump

    @torch.no_grad()
    def reset_anchor(self) -> None:
        """Start a new cycle at the weights as they are now, without jumping.

        Call it after weights were edited from outside (best model loaded, averaged weights swapped in, pruning): else
        the next jump extrapolates across the edit. The drift estimate is kept; the gate judges whether it still holds.
        Where it or the anchor does not fit the parameter any more, both begin anew, with a warning.
        """
        self._renew()
        for group, ends in self._anchored_steps():
            for p, state, *_ in ends:
                state["extra_anchor"].copy_(p)
            self._restart(group["extra_every"], ends, taken_in=0)
        self._phases_changed()
