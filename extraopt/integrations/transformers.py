"""ExtraAdam in transformers' Trainer and in TRL's: logs of its jumps, checks, roll-back by a logged metric.

Needs transformers; `import extraopt` does not import this file.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from statistics import fmean
from typing import Any

from torch.optim import AdamW
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..adam import ExtraAdam
from ..extrapolation import JumpReport
from ..mixin import CycleMixin, group_keeps_estimate
from ..rollback import FEWEST

logger = logging.getLogger(__name__)


class ExtraCallback(TrainerCallback):
    """Watches ExtraAdam, or Extra, in a Trainer of transformers or TRL.

    - **Logs** every end of a cycle with the Trainer's next log, so that it reaches ``state.log_history`` and whatever
      ``report_to`` names: ``extra/gate``, ``extra/coherence`` and ``extra/drift_norm`` (means over the cycles that
      ended since the last log), ``extra/jumped`` and ``extra/refused`` (tensors, summed over them), and with a metric
      ``extra/taken_back`` (jumps, summed).
    - **Fails** when training begins and another optimizer is the one that steps.
    - **Aligns** cycles with generation: GRPO and RLOO may take several optimizer steps on one batch of completions,
      and a jump between them would be taken for a change of policy. When a run begins, ``extra_every`` of each group is
      raised to the next multiple of these steps; a log line says so. A resumed run keeps its cycles.
    - **Starts a cycle** when a run begins that resumes nothing: ``load_best_model_at_end`` of the run before may have
      written other weights.
    - **Takes back** a jump after which the metric is worse, by :meth:`extraopt.ExtraAdam.report`.

    Args:
        metric (str, optional): key of the Trainer's logs that tells how good the model is, as ``"reward"`` or
            ``"eval_loss"``; None takes nothing back. ``"auto"`` is the policy's ``"entropy"`` in GRPO and RLOO, whose
            jumps may else make a policy so sure that it no longer samples what it has yet to learn, and None in other
            Trainers and for a rule that keeps no estimate (default: ``"auto"``). The Trainer logs a step when it is
            done and an average over the steps since the last log, so a value counts only where no cycle ended in
            these; what an evaluation measured (``eval_...``) counts at once. A verdict takes 3 values in each of two
            cycles: log every step.
        greater_is_better (bool, optional): False where a lower metric is better, as of losses (default: True)

    Raises:
        RuntimeError: when training begins: another optimizer steps, or the metric is of no use because the optimizer
            keeps no estimate to go back by.

    Warns:
        RuntimeWarning: a cycle ended between two optimizer steps on one batch of completions; fewer than 3 values of
            the metric counted in a cycle. Once each.

    Example::

        >>> trainer = GRPOTrainer(..., args=GRPOConfig(..., logging_steps=1))  # takes back what costs entropy
        >>> use_extra_adam(trainer)
        >>> trainer.train()
    """

    def __init__(self, metric: str | None = "auto", *, greater_is_better: bool = True) -> None:
        self.metric = metric
        self.greater_is_better = greater_is_better
        self._optimizer: CycleMixin | None = None  # only during training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check which optimizer steps, align its cycles, and get ready to log first."""
        self._optimizer = optimizer = _stepping(kwargs.get("optimizer"))
        self._reports: list[JumpReport] = []  # of cycles that ended since the last log
        self._last = optimizer.last_jump
        self._ended = self._logged = self._begun = state.global_step  # steps: of the last cycle's end, of the last log
        self._values = 0  # of the metric, in this cycle
        self._warned: set[str] = set()
        self._taken_back = 0  # jumps since the last log
        self._metric = self.metric
        if self.metric == "auto":
            samples = hasattr(args, "num_generations") and all(map(group_keeps_estimate, optimizer.param_groups))
            self._metric = "entropy" if samples else None
        if self._metric is not None:
            optimizer.report(math.nan)  # counts for nothing, but raises now what it would raise at the first log
        self._generation = _steps_per_generation(args)
        if state.global_step == 0:
            if self._generation > 1:
                _align(optimizer, self._generation, state.is_world_process_zero)
            # Weights may have been written since the last step: the best ones, at the end of an earlier training.
            # DeepSpeed's empty step, before the first, would put every cycle off by one.
            optimizer.reset_anchor()
        self._log_first()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a cycle that somebody ended since the last step."""
        self._look(state, state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a cycle that ended with this step, which the Trainer has not counted yet."""
        self._look(state, state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Report the metric to the optimizer, and add to the log what happened since the last one."""
        if self._optimizer is None or logs is None:
            return  # an evaluation outside of training
        self._look(state, state.global_step)
        self._judge(self._optimizer, logs)
        if any(key.startswith("eval_") for key in logs):
            return
        self._logged = state.global_step
        news = self._news()
        logs.update(news)
        # the history has got a copy already
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1].update(news)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let go of the optimizer."""
        self._optimizer = self._last = None

    def _log_first(self) -> None:
        # One dict goes from callback to callback, and those of `report_to` come before the user's: they would not see
        # what is added after them. Callbacks are not told their handler, but it is the one that is calling.
        frame = sys._getframe(1)
        while not isinstance(handler := frame.f_locals.get("self"), CallbackHandler):
            if frame.f_back is None:
                return
            frame = frame.f_back
        handler.callbacks.sort(key=lambda callback: callback is not self)

    def _look(self, state: TrainerState, step: int) -> None:
        if self._optimizer is None or self._optimizer.last_jump is self._last:
            return
        self._last = self._optimizer.last_jump
        if self._last is None:  # a state was loaded in mid-run
            return
        self._reports.append(self._last)
        whole = self._ended > self._begun or self._begun == 0  # not cut by a resumption
        self._ended = step
        if (step - self._begun) % self._generation:  # a Trainer that resumes generates anew
            self._warn(
                "generation",
                f"a cycle ended after step {step}, between two steps on one batch of completions, which lasts for "
                f"{self._generation} optimizer steps: let extra_every be a multiple of it, and resume from a "
                "checkpoint at its end.",
            )
        if self._metric is not None and self._values < FEWEST and whole:
            known = sorted({key for log in state.log_history for key in log})
            if known or self.metric != "auto":  # else the Trainer has not logged yet
                self._warn(
                    "metric",
                    f"{self._values} values of {self._metric!r} counted in the cycle that ended after step {step}, and "
                    f"no jump is taken back by fewer than {FEWEST}. Set logging_steps=1 (a log over several steps does "
                    "not count where a cycle ended in them), or a larger extra_every; metric=None takes nothing back."
                    + f" Keys logged so far: {known}."
                    * (self._metric not in known),
                )
        self._values = 0

    def _judge(self, optimizer: CycleMixin, logs: dict[str, Any]) -> None:
        """Report the metric, if `logs` have it and it is of weights since the last end of a cycle."""
        if self._metric is None or self._metric not in logs or "train_runtime" in logs:  # the averages of all training
            return
        if not self._metric.startswith("eval_") and self._ended > self._logged:
            return
        value = math.nan if logs[self._metric] is None else float(logs[self._metric])
        self._values += math.isfinite(value)
        # on every rank: the Trainer logs on all of them, and report() takes the mean
        self._taken_back += optimizer.report(value if self.greater_is_better or self.metric == "auto" else -value)

    def _news(self) -> dict[str, float]:
        """What happened since the last log."""
        reports, self._reports = self._reports, []
        news: dict[str, float] = {}
        if reports:
            means = {name: fmean(getattr(r, name) for r in reports) for name in ("gate", "coherence", "drift_norm")}
            sums = {name: sum(getattr(r, name) for r in reports) for name in ("jumped", "refused")}
            news = {f"extra/{name}": value for name, value in (means | sums).items()}
        if self._metric is not None:
            news["extra/taken_back"], self._taken_back = self._taken_back, 0
        return news

    def _warn(self, of: str, text: str) -> None:
        if of not in self._warned:
            self._warned.add(of)
            warnings.warn(f"ExtraCallback: {text}", RuntimeWarning, stacklevel=2)


def use_extra_adam(
    trainer: Trainer, *, metric: str | None = "auto", greater_is_better: bool = True, **options: Any
) -> ExtraCallback:
    """Let a Trainer that was built without it train by ExtraAdam, and watch it.

    For TRL's trainers that take no ``optimizer_cls_and_kwargs`` (GRPO, RLOO, DPO and others), and any other Trainer.
    Learning rate, betas, epsilon and ``fused`` are those that the Trainer would have given to AdamW, weight decay and
    schedule too: with ``extra_steps=0`` it trains as without this call, bit for bit.

    Args:
        trainer (Trainer): built, but not trained yet.
        metric (str, optional): as for :class:`ExtraCallback` (default: ``"auto"``)
        greater_is_better (bool, optional): as for :class:`ExtraCallback` (default: True)
        **options: keyword arguments of :class:`~extraopt.ExtraAdam`, the ``extra_*`` knobs or others.

    Returns:
        ExtraCallback: the one that was added to the Trainer.

    Raises:
        RuntimeError: the Trainer has an optimizer already.
        ValueError: ``args.optim`` asks for an optimizer that is not torch's AdamW.

    Example::

        >>> trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=data)
        >>> use_extra_adam(trainer, extra_every=10, extra_steps=200)
        >>> trainer.train()
    """
    if trainer.optimizer is not None:
        raise RuntimeError(
            f"The Trainer has an optimizer already, {type(trainer.optimizer).__name__}: call use_extra_adam() before "
            "train(), and build it without `optimizers`."
        )
    model: Any = trainer.model
    kind, of_args = trainer.get_optimizer_cls_and_kwargs(trainer.args, model)
    if kind is not AdamW:
        raise ValueError(
            f"args.optim asks for {kind.__module__}.{kind.__name__}, and ExtraAdam is torch's AdamW: set "
            "optim='adamw_torch', or wrap another in extraopt.wrap.Extra and give it to the Trainer as `optimizers`."
        )
    trainer.optimizer_cls_and_kwargs = (ExtraAdam, {**of_args, **options})
    callback = ExtraCallback(metric, greater_is_better=greater_is_better)
    trainer.add_callback(callback)
    return callback


def _stepping(optimizer: Any) -> CycleMixin:
    """The one of ours that steps within the wrappers of accelerate and DeepSpeed.

    Raises:
        RuntimeError: it is another optimizer.
    """
    names = [type(optimizer).__name__]
    while not isinstance(optimizer, CycleMixin) and getattr(optimizer, "optimizer", None) is not None:
        optimizer = optimizer.optimizer
        names.append(type(optimizer).__name__)
    if isinstance(optimizer, CycleMixin):
        return optimizer
    if any(name.startswith(("DeepSpeed", "Dummy")) for name in names):
        cure = (
            'give ExtraAdam to the Trainer, take "optimizer" out of the DeepSpeed configuration, and where that '
            'offloads the optimizer set "zero_force_ds_cpu_optimizer": false in it, else it is replaced by '
            "DeepSpeedCPUAdam."
        )
    else:
        cure = (
            "call use_extra_adam(trainer) before trainer.train(), or build the Trainer with "
            "optimizer_cls_and_kwargs=(ExtraAdam, {...})."
        )
    raise RuntimeError(f"{names[-1]} steps here, not ExtraAdam, and nothing would ever jump: {cure}")


def _steps_per_generation(args: TrainingArguments) -> int:
    """Optimizer steps after which a batch of completions and an optimizer step end together; 1 without generation."""
    micro_batches: int = (getattr(args, "steps_per_generation", None) or 1) * getattr(args, "num_iterations", 1)
    return math.lcm(micro_batches, args.gradient_accumulation_steps) // args.gradient_accumulation_steps


def _align(optimizer: CycleMixin, steps: int, say: bool) -> None:
    for group in optimizer.param_groups:
        every = -(-group["extra_every"] // steps) * steps
        if say and every != group["extra_every"]:
            logger.warning(
                "extra_every is %d instead of %d: a batch of completions lasts for %d optimizer steps, and no jump may "
                "fall between them.", every, group["extra_every"], steps,
            )  # fmt: skip
            say = False
        group["extra_every"] = every
