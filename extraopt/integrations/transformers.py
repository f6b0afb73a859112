"""ExtraAdam in transformers' Trainer and in TRL's: logs of its jumps, and checks.

Needs transformers; `import extraopt` does not import this file.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Callable
from functools import partial
from statistics import fmean
from typing import Any

from torch.optim import AdamW
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..adam import ExtraAdam
from ..extrapolation import JumpReport
from ..mixin import CycleMixin

logger = logging.getLogger(__name__)


class ExtraCallback(TrainerCallback):
    """Watches ExtraAdam, or Extra, in a Trainer of transformers or TRL.

    - **Logs** every end of a cycle with the Trainer's next log, so that it reaches ``state.log_history`` and whatever
      ``report_to`` names: ``extra/length``, ``extra/kl``, ``extra/fall``, ``extra/gate``, ``extra/coherence`` and
      ``extra/drift_norm`` (means over the cycles that ended since the last log, of what was measured), and
      ``extra/jumped`` and ``extra/refused`` (tensors, summed over them). It has to come before the callbacks that
      report, as :func:`use_extra_adam` puts it; else only ``state.log_history`` and the callbacks after it are told.
    - **Lets the trust region find the model** when training begins, but for ``extra_watch=False``.
    - **Fails** when training begins and another optimizer is the one that steps.
    - **Aligns** cycles with generation: GRPO and RLOO may take several optimizer steps on one batch of completions,
      and a jump between them would be taken for a change of policy. When a run begins without cycles of its own,
      ``extra_every`` of each group is raised to the next multiple of these steps; a log line says so.
    - **Starts a cycle** when a run begins that resumes nothing: ``load_best_model_at_end`` of the run before may have
      written other weights.

    Raises:
        RuntimeError: when training begins and another optimizer steps.

    Warns:
        RuntimeWarning: a cycle ended between two optimizer steps on one batch of completions. Once.

    Example::

        >>> trainer = GRPOTrainer(..., args=GRPOConfig(..., logging_steps=1))
        >>> use_extra_adam(trainer)
        >>> trainer.train()
    """

    def __init__(self) -> None:
        self._optimizer: CycleMixin | None = None  # only during training

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check which optimizer steps, align its cycles, and let it find the model."""
        self._optimizer = optimizer = _stepping(kwargs.get("optimizer"))
        self._reports: list[JumpReport] = []  # of cycles that ended since the last log
        self._last = optimizer.last_jump
        self._begun = state.global_step
        self._warned = False
        self._generation = _steps_per_generation(args)
        begun = any("extra_anchor" in entries for entries in optimizer.state.values())
        if self._generation > 1 and (state.global_step == 0 or not begun):
            _align(optimizer, self._generation, state.is_world_process_zero)
        if state.global_step == 0:
            # Weights may have been written since the last step: the best ones, at the end of an earlier training.
            # DeepSpeed's empty step, before the first, would put every cycle off by one.
            optimizer.reset_anchor()
        model = kwargs.get("model")
        if model is not None and optimizer._trust.watch.searching and args.world_size == 1 and args.n_gpu <= 1:
            # else it is the one around it that has to be found
            optimizer.watch(model, logits=optimizer._trust.watch.logits)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a cycle that somebody ended since the last step."""
        self._look(state.global_step)

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Notice a cycle that ended with this step, which the Trainer has not counted yet."""
        self._look(state.global_step + 1)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add to the log what happened since the last one."""
        if self._optimizer is None or logs is None:
            return  # an evaluation outside of training
        self._look(state.global_step)
        if any(key.startswith("eval_") for key in logs):
            return
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

    def _look(self, step: int) -> None:
        if self._optimizer is None or self._optimizer.last_jump is self._last:
            return
        self._last = self._optimizer.last_jump
        if self._last is None:  # a state was loaded in mid-run
            return
        self._reports.append(self._last)
        if (step - self._begun) % self._generation and not self._warned:  # a Trainer that resumes generates anew
            self._warned = True
            warnings.warn(
                f"ExtraCallback: a cycle ended after step {step}, between two steps on one batch of completions, which "
                f"lasts for {self._generation} optimizer steps: let extra_every be a multiple of it, and resume from a "
                "checkpoint at its end.",
                RuntimeWarning,
                stacklevel=2,
            )

    def _news(self) -> dict[str, float]:
        """What happened since the last log."""
        reports, self._reports = self._reports, []
        if not reports:
            return {}
        news: dict[str, float] = {}
        for name in ("length", "kl", "fall", "gate", "coherence", "drift_norm"):
            measured = [x for x in (getattr(report, name) for report in reports) if not math.isnan(x)]
            if measured:
                news[f"extra/{name}"] = fmean(measured)
        return news | {f"extra/{name}": sum(getattr(r, name) for r in reports) for name in ("jumped", "refused")}


def use_extra_adam(trainer: Trainer, **options: Any) -> ExtraCallback:
    """Let a Trainer that was built without it train by ExtraAdam, and watch it.

    For TRL's trainers that take no ``optimizer_cls_and_kwargs`` (GRPO, RLOO, DPO and others), and any other Trainer.
    Learning rate, betas, epsilon and ``fused`` are those that the Trainer would have given to AdamW, weight decay and
    schedule too: with ``extra_steps=0`` it trains as without this call, bit for bit. They are read when the Trainer
    makes its optimizer, in ``hyperparameter_search`` anew for each trial.

    Args:
        trainer (Trainer): built, but not trained yet.
        **options: keyword arguments of :class:`~extraopt.ExtraAdam`, the ``extra_*`` hyperparameters or others. They
            come before what the Trainer would have given, in every trial.

    Returns:
        ExtraCallback: the one that was added to the Trainer.

    Raises:
        RuntimeError: the Trainer has an optimizer already.
        ValueError: ``args.optim`` asks for an optimizer that is not torch's AdamW.

    Warns:
        RuntimeWarning: when the optimizer is made, where what the Trainer would give has changed since this call and
            one of ``options`` holds instead.

    Example::

        >>> trainer = GRPOTrainer(model, reward_funcs=reward, args=config, train_dataset=data)
        >>> use_extra_adam(trainer, extra_every=5, extra_steps=200)
        >>> trainer.train()
    """
    if trainer.optimizer is not None:
        raise RuntimeError(
            f"The Trainer has an optimizer already, {type(trainer.optimizer).__name__}: call use_extra_adam() before "
            "train(), and build it without `optimizers`."
        )
    asked: Any = trainer.get_optimizer_cls_and_kwargs
    if getattr(asked, "func", None) is _extra_adam:  # this is a second call, whose options hold
        asked = asked.args[0]
    _, now = _extra_adam(asked, {}, {}, trainer.args, trainer.model)
    # the Trainer asks when it makes its optimizer: in each trial of a hyperparameter search by other arguments
    trainer.optimizer_cls_and_kwargs = None
    trainer.get_optimizer_cls_and_kwargs = partial(_extra_adam, asked, options, now)  # type: ignore[method-assign]
    callback = ExtraCallback()
    trainer.callback_handler.callbacks.insert(0, callback)  # one dict of logs goes from callback to callback
    return callback


def _extra_adam(
    asked: Callable[..., Any],
    options: dict[str, Any],
    before: dict[str, Any],
    args: TrainingArguments,
    model: Any = None,
) -> tuple[type[ExtraAdam], dict[str, Any]]:
    """ExtraAdam and its arguments in the place of AdamW's.

    Args:
        asked: the Trainer's own `get_optimizer_cls_and_kwargs`.
        options: come before its answer.
        before: its answer when these options were given.
        args: to ask by.
        model: likewise.

    Raises:
        ValueError: the Trainer would make another optimizer.
    """
    kind, now = asked(args, model)
    if kind is not AdamW:
        raise ValueError(
            f"args.optim asks for {kind.__module__}.{kind.__name__}, and ExtraAdam is torch's AdamW: set "
            "optim='adamw_torch', or wrap another in extraopt.wrap.Extra and give it to the Trainer as `optimizers`."
        )
    for key in sorted(key for key in options.keys() & now.keys() if now[key] != before.get(key)):
        warnings.warn(
            f"extraopt: the Trainer's {key} is {now[key]!r} by now, but what use_extra_adam() was given holds, "
            f"{options[key]!r}: a search over {key} needs it left out there.",
            RuntimeWarning,
            stacklevel=2,
        )
    return ExtraAdam, {**now, **options}


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
