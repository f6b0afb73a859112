"""Extra: the cycle of ExtraAdam around any other torch optimizer."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from .adam import ExtraAdam
from .hyperparameters import DEFAULTS, check_hyperparameters
from .mixin import CycleMixin, Ending, endings, learning_rate_is_zero, momentum_of, unhooked_step
from .schedule import Stepped
from .state import (
    all_or_nothing,
    check_cycle,
    check_group,
    copy_to_place,
    here,
    modernize,
    new_anchor,
    number,
    read_numbers,
    shielded,
    upgraded,
)


def _of_base(name: str) -> Any:
    # never a copy: base optimizers, schedulers and loaders replace whole dicts and lists
    return property(
        lambda self: getattr(self.base_optimizer, name), lambda self, v: setattr(self.base_optimizer, name, v)
    )


class Extra(Optimizer, CycleMixin):
    r"""Any optimizer, jumping ahead along the straight part of its own path.

    The rule is that of :class:`~extraopt.ExtraAdam`, with the base optimizer's step in the place of AdamW's and, in the
    gate, the momentum that the base names ``betas``, ``momentum`` or ``beta1`` in its groups (0 without any). Around
    :class:`torch.optim.AdamW` it makes the same weights as ExtraAdam, bit for bit. The base optimizer's own state is
    kept over a jump.

    ``param_groups``, ``state`` and ``defaults`` are the base optimizer's: schedulers may hold either of the two.
    Call ``step``, ``load_state_dict`` and ``add_param_group`` on this one.

    Args:
        base_optimizer (Optimizer): takes the real steps. Its parameters may be floating or complex tensors of any shape
            and layout, on any device, DTensors too. Any ``extra_*`` below that stands in one of its groups holds for
            that group.
        extra_every, extra_steps, extra_beta, extra_gate, extra_start, extra_kl, extra_fall, extra_watch, extra_offload:
            as of :class:`~extraopt.ExtraAdam`, whose defaults hold here. After changing ``extra_every`` during training
            call :meth:`reset_anchor`.

    Shapes:
        ``state[p]`` holds the base optimizer's entries and, where ``extra_steps > 0``, ``extra_anchor`` (the weights
        before the cycle), ``extra_estimate`` (:math:`V`; absent for the paper's rule), both of the shape, dtype, device
        (but for ``extra_offload``) and layout of ``p``, ``extra_step`` (float64 [], applied steps: calls of ``step`` in
        which ``p`` had a gradient), ``extra_origin`` (float64 [], the applied step from which cycles are counted),
        ``extra_noise_cov`` and ``extra_noise_var`` (float64 []), these four in host memory; its groups hold
        ``extra_length``.

    Loading:
        ``load_state_dict`` takes the state of an Extra around the same kind of optimizer, or of that optimizer alone.
        Hyperparameters that the state lacks keep this optimizer's values. A parameter that comes without an anchor
        starts a new cycle at its next step.

    Raises:
        TypeError: ``base_optimizer`` is not a torch optimizer.
        ValueError: a hyperparameter outside its range; a base that jumps already; a base that has to call a closure
            within its step (:class:`torch.optim.LBFGS`); a loaded state of other parameters (the optimizer is left as
            it was).
        RuntimeError: a step captured in a CUDA graph; :meth:`jump` or :meth:`reset_anchor` while a schedule-free base
            is in eval mode.

    Warns:
        RuntimeWarning: a parameter was pruned, grown or cast in mid-run, or just before its state was saved, and starts
            a new cycle; names it.
        RuntimeWarning: a tensor was refused because its weights, anchor or drift are not finite or its jump could
            overflow its dtype. Its weights are left as the base made them and a new cycle starts from there.

    .. note::
        Schedule-free bases (those of ``schedulefree`` that have ``train`` and ``eval``) keep three sequences: the
        weights in train mode, their average in eval mode, and ``state[p]["z"]``. Cycles are those of the weights in
        train mode, and a jump moves all three by the same displacement. Any other base that keeps a second copy of the
        weights in its state and writes it back (master weights) undoes the jump.

    .. note::
        Under a gradient scaler the scaler unscales and decides about a step, also where the base is ``fused``. Under
        ``torch.compile`` the step runs uncompiled.

    Example::

        >>> optimizer = Extra(torch.optim.Muon(model.parameters(), lr=1e-3))
        >>> scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()
    """

    # A scaler that left unscaling and skipping to a fused base would not say, without a wait for the device, whether
    # the step was applied.
    _step_supports_amp_scaling = False

    def __init__(
        self,
        base_optimizer: Optimizer,
        *,
        extra_every: int = DEFAULTS["extra_every"],
        extra_steps: int = DEFAULTS["extra_steps"],
        extra_beta: float = DEFAULTS["extra_beta"],
        extra_gate: float | None = DEFAULTS["extra_gate"],
        extra_start: int = DEFAULTS["extra_start"],
        extra_kl: float | None = DEFAULTS["extra_kl"],
        extra_fall: float = DEFAULTS["extra_fall"],
        extra_watch: bool = DEFAULTS["extra_watch"],
        extra_offload: bool = DEFAULTS["extra_offload"],
    ) -> None:
        kind = type(base_optimizer)
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"Invalid base_optimizer: {kind.__name__} is not a torch.optim.Optimizer.")
        if isinstance(base_optimizer, (Extra, ExtraAdam)):
            raise ValueError(f"Invalid base_optimizer: {kind.__name__} jumps already.")
        closure = inspect.signature(kind.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(
                f"Invalid base_optimizer: {kind.__name__} calls a closure within its step, so there are no single "
                "steps to make cycles of."
            )
        hyperparameters = check_hyperparameters(
            {
                **DEFAULTS,
                "extra_every": extra_every,
                "extra_steps": extra_steps,
                "extra_beta": extra_beta,
                "extra_gate": extra_gate,
                "extra_start": extra_start,
                "extra_kl": extra_kl,
                "extra_fall": extra_fall,
                "extra_watch": extra_watch,
                "extra_offload": extra_offload,
            }
        )
        checked = [check_hyperparameters({**hyperparameters, **group}) for group in base_optimizer.param_groups]
        for group, values in zip(base_optimizer.param_groups, checked):
            group.update(values)
            check_group(group)
        base_optimizer.defaults.update(hyperparameters)
        # not torch's constructor, which would set up groups and state that are there already
        self.__setstate__({"base_optimizer": base_optimizer})

    _counter = "extra_step"
    base_optimizer: Optimizer
    defaults = _of_base("defaults")
    state = _of_base("state")
    param_groups = _of_base("param_groups")
    # Only schedule-free bases have these. Trainers call them where `hasattr` finds them.
    train = _of_base("train")
    eval = _of_base("eval")

    def __getstate__(self) -> dict[str, Any]:
        return {"base_optimizer": self.base_optimizer}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # The base is stepped without its hooks, so those registered on it run with ours: once, and after the jump.
        self._optimizer_step_pre_hooks = self.base_optimizer._optimizer_step_pre_hooks
        self._optimizer_step_post_hooks = self.base_optimizer._optimizer_step_post_hooks
        self._forget()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters start a cycle of their own at their first step.

        Args:
            param_group (dict): ``params`` and options, the ``extra_*`` hyperparameters among them.

        Raises:
            ValueError: a hyperparameter outside its range.
        """
        if isinstance(param_group, dict):  # else the base says what is wrong with it
            param_group.update(check_hyperparameters({**self.defaults, **param_group}))
            check_group(param_group)
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The state of the base optimizer, in its own format, with the cycle's entries and hyperparameters in it."""
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state_dict: dict[str, Any] = self.base_optimizer.state_dict()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state_dict)
            state_dict = state_dict if changed is None else changed
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state dict of an Extra around the same kind of optimizer, or of that optimizer alone.

        Args:
            state_dict (dict): what :meth:`state_dict` returned.

        Raises:
            ValueError: groups, hyperparameters, or the shape of an anchor or drift do not fit. The optimizer is left as
            it was.
        """
        state_dict = state_dict.copy()  # hooks may write into it
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        own = self.param_groups
        with all_or_nothing(self):
            # the base's own method: 8-bit optimizers know which of their tensors must not be cast
            self.base_optimizer.load_state_dict(shielded(state_dict, any(group["extra_offload"] for group in own)))
            for i, (group, old) in enumerate(zip(self.param_groups, own)):
                for p in group["params"]:
                    counter = "extra_step" if "extra_step" in self.state.get(p, ()) else "step"
                    modernize(self.state.get(p, {}), group, counter, momentum_of(group))
                group.update(check_hyperparameters({**self.defaults, **old, **upgraded(group), **here(old)}))
                check_group(group)
                (
                    momentum_of(group),
                    learning_rate_is_zero(group),
                )  # what can't be read as a number fails here, not in a step
                for j, p in enumerate(group["params"]):
                    self._take_over(p, f"parameter {j} in group {i}", group["extra_offload"])
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _take_over(self, p: Tensor, name: str, offload: bool) -> None:
        state = self.state.get(p, {})
        check_cycle(state, p, name, "extra_step" if "extra_step" in state else "step")
        copy_to_place(state, p, offload)  # bitsandbytes leaves everything on the device where it was saved

    @_disable_dynamo
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single step of the base optimizer, and end the cycles that are due with it.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss. It is called once, before the
                step.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: the step is being captured in a CUDA graph.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()

        stepped = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        self._refuse_capture(stepped)
        schedule = self._schedule
        quiet = schedule.quiet(self.param_groups, self.state)
        with torch.no_grad():
            known = quiet or self._known()
            fresh = {} if known else self._begin_cycles(stepped)
        # a scheduler that was made for the base would warn that it never steps
        self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        unhooked_step(type(self.base_optimizer))(self.base_optimizer)
        self._join(fresh)
        with torch.no_grad():
            if known and schedule.holds(self.state):
                pairs = [[pair for pair in pairs if pair[0].grad is not None] for pairs in schedule.stepped]
            else:
                every = ([(p, self.state.get(p, {})) for p in params] for params in stepped)
                pairs, quiet = [[pair for pair in own if "extra_anchor" in pair[1]] for own in every], False
            self._count(pairs)
            if quiet:
                schedule.count()
            else:
                states = [state for _, state in chain.from_iterable(pairs)]
                self._end_those_due(pairs, read_numbers(states, "extra_step"))
        self._trust.watch.armed = schedule.near
        return loss

    def _count(self, moved: list[list[Stepped]]) -> None:
        """One more applied step of these parameters."""
        states = [state for pairs in moved for _, state in pairs]
        counters = [state["extra_step"] for state in states]
        if counters and set(map(type, counters)) == {Tensor}:
            torch._foreach_add_(counters, 1.0)  # by 1 it takes twice as long
        else:  # plain numbers among them
            for state in states:
                state["extra_step"] += 1

    def _refuse_capture(self, stepped: list[list[Tensor]]) -> None:
        for group, params in zip(self.param_groups, stepped):
            if group["extra_steps"] and any(p.is_cuda for p in params) and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "Extra.step() cannot be captured in a CUDA graph: a replay would never end a cycle. Capture the "
                    "forward and backward pass and call step() outside the graph, or set extra_steps=0."
                )

    def _begin_cycles(self, stepped: Iterable[Iterable[Tensor]]) -> dict[Tensor, dict[str, Any]]:
        fresh = super()._begin_cycles(stepped)
        for p in (p for params in stepped for p in params):
            if "extra_anchor" in fresh.get(p, ()):
                fresh[p]["extra_step"] = fresh[p]["extra_origin"]
            elif "extra_anchor" in self.state.get(p, ()) and "extra_step" not in self.state[p]:
                self.state[p]["extra_step"] = number(int(self.state[p]["step"]), p)  # from an ExtraAdam
        return fresh

    def _applied_steps(self, p: Tensor) -> int:
        # a base that has stepped before, or was loaded from a run without jumps, may have counted its steps
        state = self.state.get(p, {})
        return int(state.get("extra_step", state.get("step", 0)))

    @contextlib.contextmanager
    def _moving(self, params: Iterable[Tensor]) -> Iterator[None]:
        # A schedule-free base steps z and pulls the weights towards it, so z has to move along (and x and y in the
        # variants that store them). The average that eval mode shows lies on the line through both and follows.
        before = {p: new_anchor(p) for p in params if "train_mode" in self.param_groups[0]}
        yield
        for p, old in before.items():
            for key in self.state[p].keys() & {"x", "y", "z"}:
                self.state[p][key].add_(p.detach() - old)

    def _anchored_steps(self) -> Iterator[tuple[dict[str, Any], list[Ending]]]:
        for group in self.param_groups:
            params = [p for p in group["params"] if {"extra_anchor", "extra_step"} <= self.state.get(p, {}).keys()]
            if params and not group.get("train_mode", True):
                raise RuntimeError(
                    "The weights are an average while the optimizer is in eval mode: call train() first."
                )
            if params:
                states = [self.state[p] for p in params]
                yield group, endings(list(zip(params, states)), read_numbers(states, "extra_step"))
