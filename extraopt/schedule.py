"""When cycles are due, told without reading every step counter at every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from operator import eq, is_
from typing import Any

import torch
from torch import Tensor

FAR = 1 << 62
_FORM = [fact.__get__ for fact in (Tensor.shape, Tensor.dtype)]  # type: ignore[union-attr]
Stepped = tuple[Tensor, dict[str, Any]]  # a parameter and its state


def read_counters(counters: Sequence[Tensor]) -> list[int]:
    """The values of 0-dim step counters; one transfer for all that live on a device."""
    if all(c.is_cpu for c in counters):
        return list(map(int, map(Tensor.item, counters)))
    return [int(c) for c in torch.stack([c.to(counters[0].device) for c in counters]).tolist()]


def _settings(groups: Iterable[Mapping[str, Any]]) -> list[tuple[int, int]]:
    return [(group["extra_every"], group["extra_steps"]) for group in groups]


class Schedule:
    """What an optimizer knew when it last read its step counters, and so until when no cycle can begin or end.

    Caches only: a resumed run does without. Written in place, never rebound, since wrappers that take on an optimizer's
    class (Lightning's) share what it holds but not what they would assign.

    Attributes:
        waiting: parameters whose steps so far had a learning rate of 0: the first step that moves takes their anchor.
        ended: applied steps at which cycles have ended, by id of parameters that may have taken none since. To hash a
            tensor takes as long as all else that is done for it.
        params: those of all groups when counters were last read.
        stepped: of each group, the parameters that had an anchor and a gradient then, with their states.
        tables: the kernels' tables of each batch of tensors, kept from one end of a cycle to the next.
    """

    def __init__(self, counter: str = "step") -> None:
        self._counter = counter  # key of a parameter's applied steps
        self.forget()

    def forget(self) -> None:
        """Start anew, as after a state was loaded."""
        self.waiting: set[Tensor] = set()
        self.ended: dict[int, int] = {}
        self.tables: list[Any] = []
        self.params: list[Tensor] = []
        self.stepped: list[list[Stepped]] = []
        self._states: list[dict[str, Any]] = []
        self._idle: list[Tensor] = []
        self._moved: list[Tensor] = []
        self._sizes: list[int] = []
        self._forms: list[list[Any]] = []
        self._tensors: list[list[Any]] = []
        self.reread()

    def reread(self) -> None:
        """Let the next step read all counters: something has changed the phases of cycles."""
        self._left = 0  # steps until the first of the cycles can end
        self._away = False  # whether a parameter that has an anchor has no gradient
        self._stale = True  # forms and tensors

    def keep(
        self,
        groups: Sequence[Mapping[str, Any]],
        state: Mapping[Any, Any],
        left: int,
        stepped: list[list[Stepped]],
        first: int,
    ) -> None:
        """Remember that no cycle of the parameters that have a gradient now can end in fewer than `left` steps.

        Args:
            groups: the optimizer's.
            state: the optimizer's.
            left: 1 or more.
            stepped: they and their states, by group.
            first: applied steps of the first of them.
        """
        self.params = [p for group in groups for p in group["params"]]
        self._states = list(state.values())
        self._idle = [p for p in self.params if p.grad is None]
        self._away = any("extra_anchor" in state.get(p, ()) for p in self._idle)
        self._settings = _settings(groups)
        self.stepped = stepped
        moved = [p for pairs in stepped for p, _ in pairs]
        self._stale |= len(moved) != len(self._moved) or not all(map(is_, moved, self._moved))
        self._moved = moved
        self._sizes = list(map(Tensor.numel, self._moved))
        if self._stale:
            seen: dict[Any, Any] = {}  # one object for all that are equal: Python's collector looks through each
            self._forms = [[seen.setdefault(x, x) for x in map(get, self._moved)] for get in _FORM]
            self._tensors, self._stale = self._found(), False
        leader = next(chain.from_iterable(stepped), None)
        self._left, self._calls, self._first = left, 0, None if leader is None else (leader[1], first)

    def quiet(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether the next step surely begins no cycle and ends none. Never waits for a device."""
        if self._left <= 1:
            return False
        if self._first is not None:
            counter, before = self._first[0].get(self._counter), self._first[1]
            if counter is None:
                return False
            # reading it on a CPU is free, and notices edits from outside
            if getattr(counter, "is_cpu", True) and not 0 <= int(counter) - before <= self._calls:
                return False
        return self.unchanged(groups, state)

    def unchanged(self, groups: Sequence[Mapping[str, Any]], state: Mapping[Any, Any]) -> bool:
        """Whether parameters, their states and what matters of their groups are as they were: then no cycle begins."""
        return (
            bool(self.params)
            and not self.waiting
            and self._settings == _settings(groups)
            and sum(len(group["params"]) for group in groups) == len(self.params)
            and all(map(is_, chain.from_iterable(group["params"] for group in groups), self.params))
            and self.holds(state)
            and all(p.grad is None for p in self._idle)
            and list(map(Tensor.numel, self._moved)) == self._sizes  # the cheapest that tells of most surgery in place
        )

    def same_tensors(self) -> bool:
        """Whether parameters are still of the form that they were of, and the tensors of their cycles the very same.

        `unchanged` looks only at how many elements they have: all of this takes ten times as long.
        """
        forms = zip((map(get, self._moved) for get in _FORM), self._forms)
        same = not self._stale and all(all(map(eq, now, before)) for now, before in forms)
        self._stale = not (same and all(all(map(is_, *lists)) for lists in zip(self._found(), self._tensors)))
        return not self._stale

    def _found(self) -> list[list[Any]]:
        states = [state for pairs in self.stepped for _, state in pairs]
        return [[state.get(key) for state in states] for key in ("extra_anchor", "extra_estimate", "extra_origin")]

    def holds(self, state: Mapping[Any, Any]) -> bool:
        """Whether the states are those that were there when counters were last read."""
        return len(state) == len(self._states) and all(map(is_, state.values(), self._states))

    @property
    def near(self) -> bool:
        """Whether the next step may end a cycle; what took no part in the last one may be due with it."""
        return self._left <= 1 or self._away

    def count(self) -> None:
        """One more step was taken, quietly; it may have been skipped."""
        self._left -= 1
        self._calls += 1
