"""ExtraAdam: a `torch.optim.AdamW` whose step ends a cycle now and then."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import AdamW
from torch.optim.optimizer import ParamsT

from .hyperparameters import DEFAULTS, check_hyperparameters
from .mixin import CycleMixin, Ending, endings, momentum_of, unhooked_step
from .schedule import read_counters
from .state import (
    all_or_nothing,
    check_cycle,
    check_group,
    copy_to_place,
    forget_cycle,
    here,
    modernize,
    shaped,
    shielded,
    upgraded,
)

_adamw_step = unhooked_step(AdamW)


def _capturing(p: Tensor) -> bool:
    return p.is_cuda and torch.cuda.is_current_stream_capturing()


class ExtraAdam(AdamW, CycleMixin):
    r"""AdamW that jumps ahead along the straight part of its own path.

    .. math::
       \begin{aligned}
            &\rule{110mm}{0.4pt}                                                                 \\
            &\textbf{input}      : \text{all of AdamW's}, \; k \text{ (extra\_every)}, \;
                N \text{ (extra\_steps)}, \; b \text{ (extra\_beta)},                            \\
            &\hspace{13mm}      \gamma \text{ (extra\_gate)}, \; t_0 \text{ (extra\_start)}, \;
                \delta \text{ (extra\_kl)}, \; \epsilon_f \text{ (extra\_fall)}                    \\
            &\textbf{initialize} : A \leftarrow \theta_0 \text{ (anchor)}, \;
                V \leftarrow 0 \text{ (drift estimate)}                                          \\[-1.ex]
            &\rule{110mm}{0.4pt}                                                                 \\
            &\textbf{for} \: t=1 \: \textbf{to} \: \ldots \: \textbf{do}                         \\
            &\hspace{5mm}\theta_t \leftarrow \text{AdamW}(\theta_{t-1})                          \\
            &\hspace{5mm}\textbf{if} \: t \bmod k = 0                                            \\
            &\hspace{10mm}D \leftarrow \theta_t - A                                              \\
            &\hspace{10mm}g \leftarrow \mathrm{clip} \Big(
                \frac{\cos(D, V) - c}{\gamma \, (1 - c)}, \, 0, \, 1 \Big)
                \text{ to the nearest } 1/256; \; 1 \text{ if } \gamma = \text{None}              \\
            &\hspace{10mm}w \leftarrow \max(1 / (j + 1), \, 1 - b, \, g^2)
                \text{ for } j \text{ drifts in } V                                             \\
            &\hspace{10mm}V \leftarrow V + w \, (D - V)                                           \\
            &\hspace{10mm}r \leftarrow (1 - g) \min(1, \, 100 \, \lVert D \rVert / \lVert \theta_t \rVert)
                \text{ to the nearest } 1/256                                                    \\
            &\hspace{10mm}\theta(h) = \theta_t - r \, D / 2 + g \, (h / k) \, V                      \\
            &\hspace{10mm}h \leftarrow \text{the longest tried}, \leq N, \text{ with } m^2 \, \text{KL}
                (p_{\theta(0)} \Vert \, p_{\theta(h)}) \leq \delta
                \text{ and } m \, \text{fall} \leq \epsilon_f, \; m = 1 + s / h;                      \\
            &\hspace{14mm}0 \text{ if none is}; \; N \text{ if } \delta = \text{None}                  \\
            &\hspace{10mm}\textbf{if} \: t \geq t_0 \text{ and, with a gate, } V \text{ was not } 0: \;
                \theta_t \leftarrow \theta(h)                                                       \\
            &\hspace{10mm}A \leftarrow \theta_t                                                  \\
            &\rule{110mm}{0.4pt}                                                          \\[-1.ex]
            &\bf{return} \:  \theta_t                                                     \\[-1.ex]
            &\rule{110mm}{0.4pt}                                                          \\[-1.ex]
       \end{aligned}

    :math:`t` counts *applied* steps of each parameter (its ``state["step"]``): a step that a gradient scaler skips does
    not count. Each tensor has a gate of its own. It begins to open where the drift agrees with the estimate more than
    it would if gradients were pure noise: momentum alone makes drifts agree by :math:`c`, which follows from :math:`k`,
    :math:`\beta_1` and the weights :math:`w` that the estimate was made with (:func:`~extraopt.gate.averaged_noise`; at
    the defaults 0.71 after a first drift, 0.34 for a long average). As far as the gate is shut the tensor retreats, by
    half of its drift at most: the mean of anchor and weights, as in Lookahead, holds less noise than the weights. Of a
    drift below a hundredth of the weights the retreat is in proportion less: so small a noise does no harm, but to
    retreat from it costs learning. On a clean path the estimate is the newest drift, on a noisy one an average. A
    tensor without an estimate stays where AdamW put it; so nothing jumps in the first cycle. Moments are kept.

    **The trust region.** All tensors that are due share one length :math:`h`. In the last step of a cycle the inputs of
    the model's training forward pass are remembered; within ``step`` the model runs on them again, in eval mode and
    without gradients, at :math:`\theta(0)` and at one to three lengths. The first is twice the length before, which
    halves where gates are shut. Two limits hold, over all positions and over those at which two tokens or more have a
    probability of 1 in 1,000: the mean KL divergence, and the mean of the largest fall of such a token's
    log-probability, since KL hardly sees what is seldom said. They are those of a whole cycle: its real steps went as
    far along the jump as :math:`s = \langle D, u \rangle / \langle u, u \rangle` steps of it, with
    :math:`u = g V / k` over all tensors. No jump is tried that is shorter than half of :math:`s`, or than
    10 steps where that is less: where real steps alone use two thirds of the fall or four ninths of the KL, nothing
    jumps. The model is found at its first training forward pass, or named by :meth:`watch`; where none can be watched,
    jumps are at most 20 steps long and a warning says so. Under ``torch.distributed`` all ranks take one decision.

    ``extra_every=20, extra_steps=100, extra_beta=0.0, extra_gate=None, extra_kl=None`` is the rule of RL-Extra in
    `Linear Dynamics in the RLVR Training of LLMs`_, exactly. That equals Lookahead with :math:`\alpha = 1 + N/k`, and
    an outer SGD step (DiLoCo, SNOO) with learning rate :math:`1 + N/k` and no momentum. With an estimate and an open
    gate the rule is an outer momentum step of the same family; with a shut gate it lies between AdamW and Lookahead
    with :math:`\alpha = 1/2`.

    Args:
        params (iterable): parameters, named parameters or dicts of parameter groups, as for
            :class:`torch.optim.AdamW`; floating or complex tensors of any shape and layout, on any device, DTensors
            too. Every ``extra_*`` below can be set for each group.
        lr (float, Tensor, optional): learning rate (default: 1e-3)
        betas (tuple[float, float], optional): decay of AdamW's running averages (default: (0.9, 0.999))
        eps (float, optional): added to AdamW's denominator (default: 1e-8)
        weight_decay (float, optional): decoupled weight decay (default: 1e-2)
        amsgrad (bool, optional): AMSGrad variant (default: False)
        maximize (bool, optional): maximize the objective (default: False)
        foreach (bool, optional): AdamW's multi-tensor implementation (default: None, AdamW's choice)
        capturable (bool, optional): keep step counters on the device, as a CUDA graph needs them (default: False). A
            captured step is AdamW's alone: call :meth:`end_due_cycles` after each replay.
        differentiable (bool, optional): let autograd see the step (default: False). The jump is a constant to it.
        fused (bool, optional): AdamW's fused implementation (default: None)
        extra_every (int, optional): :math:`k`, applied steps in a cycle, >= 1 (default: 5). After changing it during
            training call :meth:`reset_anchor`.
        extra_steps (int, optional): :math:`N`, the longest jump in steps, >= 0; 0 is AdamW, bit for bit, with no extra
            state (default: 200)
        extra_beta (float, optional): :math:`b`, averaging of the drift over cycles, in [0, 1) (default: 0.9)
        extra_gate (float, optional): :math:`\gamma`, the part of the way from momentum's coherence to 1 at which a gate
            is fully open, in (0, 1]; None keeps all gates open (default: 0.5)
        extra_start (int, optional): applied steps before the first jump or retreat is allowed, >= 0 (default: 0)
        extra_kl (float, optional): :math:`\delta`, the largest mean KL divergence by a cycle, in nats, > 0; None is no
            trust region: every jump is :math:`N` steps long (default: 0.02, what PPO's clip of 0.2 allows)
        extra_fall (float, optional): :math:`\epsilon_f`, the largest mean fall of a plausible token's log-probability
            by a cycle, in nats, > 0; inf is no such limit (default: 0.4)
        extra_watch (bool, optional): find the model at its first training forward pass and watch its outputs; False
            watches nothing unless :meth:`watch` is called (default: True)
        extra_offload (bool, optional): keep anchors and estimates of tensors on a GPU in pinned host memory, and pass
            them through two buffers of 64 MiB at the end of a cycle; same weights, bit for bit (default: False)

    Shapes:
        ``state[p]`` holds AdamW's entries and, where ``extra_steps > 0``, ``extra_anchor`` (the weights before the
        cycle), ``extra_estimate`` (:math:`V`; absent for the paper's rule), both of the shape, dtype, device (but for
        ``extra_offload``) and layout of ``p``, ``extra_origin`` (float64 [], the applied step from which its cycles are
        counted), and ``extra_noise_cov``, ``extra_noise_var`` (float64 [], what :math:`c` follows from), these three in
        host memory. The groups hold ``extra_length`` (float, what the last search found).

    Loading:
        ``load_state_dict`` takes the state of an ExtraAdam or of an AdamW. Hyperparameters come from the state, as all
        options of a torch optimizer do, but for ``extra_offload`` and ``extra_watch``, which stay as they are here;
        those that the state lacks keep this optimizer's values. A parameter that comes without an anchor starts a new
        cycle at its next step.

    Raises:
        ValueError: a hyperparameter outside its range; a loaded state whose cycles no step could go on from, such as
            that of another parameter (the optimizer is left as it was).
        RuntimeError: sparse gradients.

    Warns:
        RuntimeWarning: a step is captured in a CUDA graph.
        RuntimeWarning: a parameter was pruned, grown or cast in mid-run, or just before its state was saved, and starts
            a new cycle; names it.
        RuntimeWarning: the model can't be watched, or failed on its inputs; says why and what to do. Once each.
        RuntimeWarning: a tensor was refused because its weights, anchor or drift are not finite or its jump could
            overflow its dtype. Its weights are left as AdamW made them and a new cycle starts from there.

    .. note::
        "ExtraAdam" is also the name of an extragradient Adam for games (`Gidel et al., arXiv 1802.10551`_). That is
        another method; this one is not related to it.

    .. note::
        Steps that end no cycle never wait for the device, save for one transfer of the step counters when they live on
        it (``fused``, ``capturable``) and the set of parameters with gradients has changed, or a state was loaded.

    .. note::
        AdamW counts steps in float32. Past 2**24 of them (16.8 million) its count stands still, and nothing jumps any
        more.

    Example::

        >>> optimizer = ExtraAdam(model.parameters(), lr=1e-6)   # was: torch.optim.AdamW(...)
        >>> loss_fn(model(input), target).backward()
        >>> optimizer.step()

    .. _Linear Dynamics in the RLVR Training of LLMs:
        https://arxiv.org/abs/2601.04537
    .. _Gidel et al., arXiv 1802.10551:
        https://arxiv.org/abs/1802.10551
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        extra_every: int = 5,
        extra_steps: int = 200,
        extra_beta: float = 0.9,
        extra_gate: float | None = 0.5,
        extra_start: int = 0,
        extra_kl: float | None = 0.02,
        extra_fall: float = 0.4,
        extra_watch: bool = True,
        extra_offload: bool = False,
    ) -> None:
        given = (
            extra_every, extra_steps, extra_beta, extra_gate, extra_start, extra_kl, extra_fall, extra_watch,
            extra_offload,
        )  # fmt: skip
        hyperparameters = check_hyperparameters(dict(zip(DEFAULTS, given)))
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, foreach=foreach, capturable=capturable,
            differentiable=differentiable, fused=fused,
        )  # fmt: skip
        for group in self.param_groups:
            group.update(check_hyperparameters({**hyperparameters, **group}))
            check_group(group)
        self.defaults.update(hyperparameters)
        self._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by pickle and deepcopy on an empty object, and by load_state_dict, after its hooks, on this one. All
        # checks come first, so that a state that is refused changes nothing.
        own = self.__dict__.get("param_groups", [])
        defaults = {**DEFAULTS, **state.get("defaults", self.__dict__.get("defaults", {}))}
        for i, group in enumerate(state["param_groups"]):
            before = own[i] if i < len(own) else {}
            known = {k: before[k] for k in DEFAULTS if k in before}
            for p in group["params"]:
                modernize(state["state"].get(p, {}), group, "step", momentum_of(group))
            group.update(check_hyperparameters({**defaults, **known, **upgraded(group), **here(known)}))
            check_group(group)
            for j, p in enumerate(group["params"]):
                entries = state["state"].get(p, {})
                if not own and not shaped(entries, p):  # a copy of an optimizer whose next step would say so
                    forget_cycle(entries)
                check_cycle(entries, p, f"parameter {j} in group {i}", "step")
                copy_to_place(entries, p, group["extra_offload"])
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()
        for key, value in DEFAULTS.items():
            self.defaults.setdefault(key, value)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True  # AdamW's constructor sets it; pickle and deepcopy lose it

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an ExtraAdam or of an AdamW.

        Args:
            state_dict (dict): what ``state_dict`` of one of them returned.

        Raises:
            ValueError: it is of other parameters, or damaged. The optimizer is left as it was.
        """
        offload = any(group["extra_offload"] for group in self.param_groups)
        # the last of the hooks: others are shown what was saved
        hook = self.register_load_state_dict_pre_hook(lambda _, loaded: shielded(loaded, offload))
        try:
            with all_or_nothing(self):
                super().load_state_dict(state_dict)
        finally:
            hook.remove()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, whose parameters start a cycle of their own at their first step.

        Args:
            param_group (dict): ``params`` and options, the ``extra_*`` hyperparameters among them.

        Raises:
            ValueError: a hyperparameter outside its range.
        """
        if "extra_every" in self.defaults and isinstance(param_group, dict):  # not yet in AdamW's constructor
            param_group.update(check_hyperparameters({**self.defaults, **param_group}))
            check_group(param_group)
        super().add_param_group(param_group)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Perform a single AdamW step, and end the cycles that are due with it.

        Args:
            closure (Callable, optional): reevaluates the model and returns the loss.

        Returns:
            What the closure returned, or None.

        Raises:
            RuntimeError: gradients are sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._before_step()
        _adamw_step(self)
        self._after_step()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def _before_step(self) -> None:
        self._quiet = self._schedule.quiet(self.param_groups, self.state) and not _capturing(self._schedule.params[0])
        if self._quiet or self._known():
            return
        stepped = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        fresh = self._begin_cycles(stepped)
        for group, params in zip(self.param_groups, stepped):
            if any(p in fresh and not self.state.get(p) for p in params):
                # AdamW's entries come first: it makes none where others are. A compiled step must find all of them, or
                # it is compiled twice.
                super()._init_group(group, [], [], [], [], [], [])  # type: ignore[no-untyped-call]
        self._join(fresh)

    @_disable_dynamo
    @torch.no_grad()
    def _after_step(self) -> None:
        if self._quiet:
            self._schedule.count()
        else:
            self._end_due_cycles()
        self._trust.watch.armed = self._schedule.near

    @torch.no_grad()
    def end_due_cycles(self) -> None:
        """End the cycles that are due after a step that was replayed from a CUDA graph.

        A graph holds AdamW's part of a step: what ends a cycle depends on numbers that only the host can act on. Call
        this after each replay; it waits for the device only where a cycle may end. After a step that was not replayed
        there is nothing for it to do.

        Example::

            >>> with torch.cuda.graph(graph):                        # after eager steps, which make the state
            ...     loss_fn(model(static_input), static_target).backward()
            ...     optimizer.step()
            >>> graph.replay()
            >>> optimizer.end_due_cycles()
        """
        if self._schedule.quiet(self.param_groups, self.state):
            self._schedule.count()
            return
        self._renew()
        self._end_due_cycles()

    def _end_due_cycles(self) -> None:
        """Read the step counters of the parameters that a step has moved, and end their cycles where they are due."""
        if self._schedule.unchanged(self.param_groups, self.state):
            pairs_of = [[pair for pair in pairs if pair[0].grad is not None] for pairs in self._schedule.stepped]
        else:
            moved = ([p for p in group["params"] if p.grad is not None] for group in self.param_groups)
            pairs_of = [[(p, self.state.get(p, {})) for p in params] for params in moved]
        stepped = [[pair for pair in pairs if "extra_anchor" in pair[1]] for pairs in pairs_of]
        everything = list(chain.from_iterable(stepped))
        if everything and _capturing(everything[0][0]):
            warnings.warn(
                "extraopt: a step is captured in a CUDA graph, which ends no cycles. Call end_due_cycles() after each "
                "replay.",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        self._end_those_due(stepped, read_counters([state["step"] for _, state in everything]))

    def _applied_steps(self, p: Tensor) -> int:
        state = self.state.get(p)
        if not state:
            return 0
        # DeepSpeed's ZeRO-3 loads a universal checkpoint with one counter for all its sub-groups
        state["step"] = state["step"].clone()
        return int(state["step"])

    def _anchored_steps(self) -> Iterator[tuple[dict[str, Any], list[Ending]]]:
        for group in self.param_groups:
            pairs = [(p, self.state.get(p, {})) for p in group["params"]]
            anchored = [(p, state) for p, state in pairs if "extra_anchor" in state]
            if anchored:
                yield group, endings(anchored, read_counters([state["step"] for _, state in anchored]))
