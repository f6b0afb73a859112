"""ExtraCallback and use_extra_adam in the Trainers of transformers and TRL, on a model of a few hundred weights."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import types
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, assert_same
from ranks import WORLD, Ranks
from test_bugs_trainers import llama, tokens

pytest.importorskip("transformers")

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from extraopt import ExtraAdam, JumpReport
from extraopt.integrations.transformers import ExtraCallback, use_extra_adam
from extraopt.wrap import Extra

JUMPS = ("extra/gate", "extra/coherence", "extra/drift_norm", "extra/jumped", "extra/refused")
STRAIGHT: dict[str, Any] = {"lr": 3e-3, "betas": (0.0, 0.99), "extra_every": 5, "extra_steps": 5}  # jumps at step 10


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "save_strategy": "no"}
    return TrainingArguments(
        str(folder), **{"max_steps": 12, "per_device_train_batch_size": 2, "logging_steps": 1, **quiet, **options}
    )


def rows(same: bool = False) -> list[dict[str, Any]]:
    return [{"input_ids": tokens(0 if same else i)[0], "labels": tokens(0 if same else i)[0]} for i in range(64)]


class Spy(TrainerCallback):
    """What a callback of `report_to` is given."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.logs.append({**logs, "step": state.global_step})


class Ends(TrainerCallback):
    """The reports of all cycles, by the global step that ended them."""

    def __init__(self) -> None:
        self.reports: dict[int, JumpReport] = {}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        report = optimizer.optimizer.last_jump
        if report is not None and report not in self.reports.values():
            self.reports[state.global_step + 1] = report


class Moved(Trainer):
    """A loss that rises by 10 once the first jump has been made."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        jump = self.optimizer.optimizer.last_jump
        loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
        loss = loss + (10 if jump is not None and jump.jumped else 0)
        return (loss, outputs) if kwargs.get("return_outputs") else loss


def trained_groups(trainer: Any) -> list[dict[str, Any]]:
    return trainer.optimizer.optimizer.param_groups


@pytest.mark.parametrize("every", [1, 4], ids=["each step", "every fourth step"])
def test_report_callbacks_that_come_first_miss_the_jumps(every: int, tmp_path: Path) -> None:
    """Those of report_to come before the user's: all see the same as the log history does."""
    first, last, ends = Spy(), Spy(), Ends()
    trainer = Trainer(
        llama(), arguments(tmp_path, max_steps=13, logging_steps=every), train_dataset=rows(same=True),
        optimizer_cls_and_kwargs=(ExtraAdam, {"lr": 1e-3, **GATED}), callbacks=[first, ExtraCallback(), ends, last],
    )  # fmt: skip
    trainer.train()
    assert list(ends.reports) == [3, 6, 9, 12] and ends.reports[12].jumped > 0
    assert first.logs == trainer.state.log_history == last.logs
    logged = {log["step"]: log for log in first.logs if "extra/gate" in log}
    assert list(logged) == {1: [3, 6, 9, 12], 4: [4, 8, 12]}[every]
    covered = {4: [3], 8: [6], 12: [9, 12]} if every == 4 else {end: [end] for end in ends.reports}
    for step, of in covered.items():
        reports = [ends.reports[end] for end in of]
        for key in JUMPS:
            values = [getattr(report, key.removeprefix("extra/")) for report in reports]
            wanted = sum(values) / (1 if key in JUMPS[3:] else len(values))
            assert logged[step][key] == pytest.approx(wanted), (step, key)
    json.dumps(trainer.state.log_history)
    assert not any("extra/taken_back" in log for log in first.logs)


def test_tensorboard_misses_the_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `report_to`, with the Trainer's own callback; only the file writer is a stand-in."""
    scalars: dict[str, list[int]] = {}

    class SummaryWriter:
        def __init__(self, log_dir: str) -> None: ...

        def add_scalar(self, key: str, value: float, step: int) -> None:
            scalars.setdefault(key, []).append(step)

        add_text = flush = close = lambda self, *_: None

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    trainer = Trainer(llama(), arguments(tmp_path, report_to="tensorboard"), train_dataset=rows())
    use_extra_adam(trainer, **GATED)
    order = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert order.index("TensorBoardCallback") < order.index("ExtraCallback")
    trainer.train()
    assert scalars["train/loss"] == list(range(1, 13))
    assert all(scalars[f"train/{key}"] == [3, 6, 9, 12] for key in JUMPS)


def test_jumps_since_the_last_log_are_lost_at_the_end(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=7, logging_steps=4), train_dataset=rows())
    use_extra_adam(trainer, **GATED)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "extra/gate" in log] == [4, 7]
    assert "train_runtime" in trainer.state.log_history[-1] and "extra/gate" in trainer.state.log_history[-1]


def test_evaluation_alone_fails_or_logs_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outside of training there is no optimizer to watch; during training jumps belong to the training logs."""
    reported = []
    monkeypatch.setattr(ExtraAdam, "report", lambda self, value: bool(reported.append(value)))
    options = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "max_steps": 6}
    trainer = Trainer(llama(), arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows()[:4])
    use_extra_adam(trainer, metric="eval_loss", greater_is_better=False, **GATED)
    trainer.evaluate()
    with pytest.warns(RuntimeWarning, match="0 values of 'eval_loss' counted"):
        trainer.train()
    before, values = trainer.state.log_history[:], len(reported)
    trainer.evaluate()
    assert values == len(reported) == 3, "one when training begins, and two evaluations of it"
    evaluations = [log for log in trainer.state.log_history if "eval_loss" in log]
    assert len(evaluations) == 3 and not any("extra/" in key for log in evaluations for key in log)
    assert [log["step"] for log in before if "extra/gate" in log] == [4, 6]


def test_another_optimizer_steps_and_nobody_notices(tmp_path: Path) -> None:
    model = llama()
    start = [p.detach().clone() for p in model.parameters()]
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[ExtraCallback()])
    with pytest.raises(RuntimeError, match=r"AdamW steps here, not ExtraAdam.*use_extra_adam\(trainer\) before"):
        trainer.train()
    assert_same([p.detach() for p in model.parameters()], start)


def test_offload_replaces_the_optimizer_silently(tmp_path: Path) -> None:
    """accelerate#2169: DeepSpeed's CPU Adam, within the wrappers that the Trainer would show."""
    from accelerate.utils import DummyOptim
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

    class DeepSpeedCPUAdam(torch.optim.AdamW): ...

    class DeepSpeedZeroOptimizer(torch.optim.Optimizer):
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.optimizer = optimizer

    def begin(optimizer: Any) -> None:
        ExtraCallback().on_train_begin(trainer.args, trainer.state, trainer.control, optimizer=optimizer)

    trainer = Trainer(llama(), arguments(tmp_path))
    params = [torch.nn.Parameter(torch.zeros(2))]
    replaced = DeepSpeedOptimizerWrapper(DeepSpeedZeroOptimizer(DeepSpeedCPUAdam(params)))
    for optimizer, name in ((replaced, "DeepSpeedCPUAdam"), (DummyOptim(params), "DummyOptim")):
        with pytest.raises(RuntimeError, match=f'{name} steps here.* set "zero_force_ds_cpu_optimizer": false in it'):
            begin(optimizer)
    with pytest.raises(RuntimeError, match="NoneType steps here"):
        begin(None)
    begin(DeepSpeedOptimizerWrapper(DeepSpeedZeroOptimizer(ExtraAdam(params))))


def test_extra_around_another_optimizer_is_taken_for_a_stranger(tmp_path: Path) -> None:
    model = llama()
    optimizer = Extra(torch.optim.SGD(model.parameters(), lr=1e-2), **GATED)
    callbacks = [ExtraCallback("loss", greater_is_better=False)]
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows(same=True), optimizers=(optimizer, None), callbacks=callbacks
    )
    with pytest.warns(RuntimeWarning, match="2 values of 'loss' counted in the cycle that ended after step 3"):
        trainer.train()
    logged = {log["step"]: log for log in trainer.state.log_history if "extra/gate" in log}
    assert list(logged) == [3, 6, 9, 12] and logged[12]["extra/jumped"] > 0


def deepspeed_run(stage: int, own: bool, folder: str) -> Any:
    """What the Trainer logs under ZeRO, or its error, with ExtraAdam given and an optimizer in DeepSpeed's own file."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": stage},
        **({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}} if own else {}),
    }
    args = arguments(Path(folder), max_steps=7, learning_rate=1e-3, deepspeed=config)
    trainer = Trainer(
        llama(), args, train_dataset=rows(), optimizer_cls_and_kwargs=(ExtraAdam, {"lr": 1e-3, **GATED}),
        callbacks=[ExtraCallback()],
    )  # fmt: skip
    try:
        trainer.train()
    except RuntimeError as error:
        return str(error)
    return [log["step"] for log in trainer.state.log_history if "extra/gate" in log]


def deepspeed_runs(folder: str) -> None:
    """Into seen.json: called by `python -c`, since DeepSpeed sets up its process for good."""
    import deepspeed.ops

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ extension that would be compiled now
    seen = {f"{stage} {own}": deepspeed_run(stage, own, folder) for stage in (2, 3) for own in (False, True)}
    Path(folder, "seen.json").write_text(json.dumps(seen))


def test_deepspeed_steps_with_the_optimizer_of_its_own_configuration(tmp_path: Path) -> None:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    ranks = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    env = {**os.environ, "DS_ACCELERATOR": "cpu", **ranks}
    code = f"import test_integrations_transformers as t; t.deepspeed_runs({str(tmp_path)!r})"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, cwd=tmp_path, timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((tmp_path / "seen.json").read_text())
    for stage in (2, 3):
        assert seen[f"{stage} False"] == [3, 6], "ExtraAdam steps within ZeRO"
        assert seen[f"{stage} True"].startswith("AdamW steps here") and 'take "optimizer" out' in seen[f"{stage} True"]


class Grpo:
    """A run of TRL's trainer: global steps at which completions were generated, and those that ended a cycle."""

    def __init__(
        self, folder: Path, reward: Any = None, resume: Path | None = None, watch: bool = True, **options: Any
    ):
        trl = pytest.importorskip("trl")
        from datasets import Dataset
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i + 3 for i in range(13)}}
        words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.generated: list[int] = []
        self.ends = Ends()
        callbacks = options.pop("callbacks", [])
        callback = {key: options.pop(key) for key in ("metric", "greater_is_better") if key in options}
        knobs = {"lr": 1e-3, **options.pop("knobs", GATED)}
        trainer, config = (trl.RLOOTrainer, trl.RLOOConfig) if options.pop("rloo", False) else (
            trl.GRPOTrainer, trl.GRPOConfig
        )  # fmt: skip

        def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.generated.append(self.trainer.state.global_step)
            spread = [0.01 * (sum(ids) % 7) for ids in completion_ids]
            return [s + (reward(self.generated[-1], self.jumped()) if reward else 0.0) for s in spread]

        quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "bf16": False, "save_strategy": "no"}
        sizes = {"per_device_train_batch_size": 4, "num_generations": 4, "max_completion_length": 3}
        self.trainer = trainer(
            model=llama(),
            reward_funcs=score,
            callbacks=callbacks,
            args=config(str(folder), **{"max_steps": 9, "logging_steps": 1, "seed": 0, **quiet, **sizes, **options}),
            train_dataset=Dataset.from_dict({"prompt": [f"{i % 10} {i % 7}" for i in range(200)]}),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
            ),
        )
        if watch:
            use_extra_adam(self.trainer, **callback, **knobs)
        else:
            self.trainer.optimizer_cls_and_kwargs = (ExtraAdam, knobs)
        self.trainer.add_callback(self.ends)
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        self.logs = self.trainer.state.log_history
        self.optimizer = self.trainer.optimizer.optimizer

    def jumped(self) -> bool:
        return any(report.jumped for report in self.ends.reports.values())

    def taken_back(self) -> list[int]:
        return [log["step"] for log in self.logs if log.get("extra/taken_back")]


@pytest.mark.parametrize(
    "options, every",
    [
        ({}, 3),
        ({"num_iterations": 2}, 4),
        ({"num_iterations": 2, "rloo": True, "beta": 0.0}, 4),
        ({"steps_per_generation": 5}, 5),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}, 4),
        ({"steps_per_generation": 3, "gradient_accumulation_steps": 2, "knobs": {**GATED, "extra_every": 4}}, 6),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 3),
    ],
    ids=["plain", "iterations", "RLOO", "generation", "all", "within accumulation", "several in a step"],
)
def test_a_jump_falls_between_two_steps_on_one_batch_of_completions(
    options: dict[str, Any], every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = options.get("knobs", GATED)["extra_every"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ExtraCallback")
        run = Grpo(tmp_path, max_steps=2 * every + 1, metric=None, **options)
    assert {group["extra_every"] for group in trained_groups(run.trainer)} == {every}
    assert list(run.ends.reports) == [every, 2 * every]
    assert set(run.ends.reports) <= set(run.generated), "the next completions are of the weights after the jump"
    said = [record.getMessage() for record in caplog.records if record.name.startswith("extraopt")]
    assert len(said) == (every != asked) and all(f"is {every} instead of {asked}" in text for text in said)


def test_a_jump_that_the_user_asks_for_is_not_logged(tmp_path: Path) -> None:
    """At the end of a step, as trainers do that know a better moment than a count of steps."""

    class Jump(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
            if state.global_step in (4, 7):
                assert optimizer.optimizer.jump().step == state.global_step

    options = {"num_iterations": 2, "max_steps": 8, "logging_steps": 3, "knobs": {**GATED, "extra_every": 50}}
    with pytest.warns(RuntimeWarning, match="a cycle ended after step 7, between two steps"):
        run = Grpo(tmp_path, callbacks=[Jump()], **options)
    assert [log["step"] for log in run.logs if "extra/gate" in log] == [6, 8]


def test_each_group_is_aligned_by_itself(tmp_path: Path) -> None:
    """And a Trainer that generates nothing keeps its cycles."""

    class Groups(ExtraAdam):
        def __init__(self, groups: Any, **options: Any) -> None:
            groups = [{**group, "extra_every": every} for group, every in zip(groups, (4, 7), strict=True)]
            super().__init__(groups, **options)

    args = arguments(tmp_path, max_steps=2)
    for generates in (True, False):
        if generates:
            args.steps_per_generation, args.num_iterations = 3, 1
        elif hasattr(args, "steps_per_generation"):
            del args.steps_per_generation, args.num_iterations
        trainer = Trainer(
            llama(), args, train_dataset=rows(), optimizer_cls_and_kwargs=(Groups, {}), callbacks=[ExtraCallback()]
        )
        trainer.train()
        every = [group["extra_every"] for group in trained_groups(trainer)]
        assert every == ([6, 9] if generates else [4, 7])


def test_a_resumed_run_changes_its_cycles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It keeps them, and a warning says once that they do not fit."""
    options = {"num_iterations": 2, "save_steps": 4, "save_strategy": "steps", "max_steps": 10}
    whole = Grpo(tmp_path / "whole", watch=False, **options)
    assert list(whole.ends.reports) == [3, 6, 9] and not {3, 9} & set(whole.generated)
    with pytest.warns(RuntimeWarning, match="ExtraCallback: a cycle ended after step 9, between two steps on") as seen:
        resumed = Grpo(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-4", **options)
    assert len([w for w in seen if "between two steps" in str(w.message)]) == 1
    assert list(resumed.ends.reports) == [6, 9]
    assert {group["extra_every"] for group in trained_groups(resumed.trainer)} == {3}
    assert not [record for record in caplog.records if record.name.startswith("extraopt")]
    assert_same(list(whole.trainer.model.parameters()), list(resumed.trainer.model.parameters()))


def test_a_run_resumed_within_a_batch_of_completions_jumps_between_its_steps(tmp_path: Path) -> None:
    """The Trainer generates anew when it resumes, so that batches begin at other steps than before."""
    options = {"num_iterations": 2, "save_steps": 3, "save_strategy": "steps", "max_steps": 5}
    whole = Grpo(tmp_path / "whole", **options)
    with pytest.warns(RuntimeWarning, match="ExtraCallback: a cycle ended after step 4, between two steps on"):
        resumed = Grpo(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-3", **options)
    assert whole.generated == [0, 2, 4] and resumed.generated == [3]
    assert list(whole.ends.reports) == list(resumed.ends.reports) == [4]


def test_values_from_before_a_jump_are_reported_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log counts if all of its steps lie within a cycle; the averages at the end of training count for nothing."""
    reported = []
    monkeypatch.setattr(ExtraAdam, "report", lambda self, value: bool(reported.append(value)))
    with pytest.warns(RuntimeWarning, match="2 values of 'reward' counted in the cycle that ended after step 5"):
        run = Grpo(tmp_path, metric="reward", max_steps=9, logging_steps=2, knobs=STRAIGHT)
    rewards = {log["step"]: log["reward"] for log in run.logs if "reward" in log}
    assert list(rewards) == [2, 4, 6, 8, 9]
    assert reported[1:] == [rewards[2], rewards[4], rewards[8]] and reported[0] != reported[0]


@pytest.mark.parametrize("rloo", [False, True], ids=["GRPO", "RLOO"])
def test_nobody_looks_at_the_entropy_of_a_policy(rloo: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default; lower is worse, whatever `greater_is_better` says of a metric that the user names."""
    reported: list[float] = []
    monkeypatch.setattr(ExtraAdam, "report", lambda self, value: bool(reported.append(value)))
    run = Grpo(tmp_path, rloo=rloo, beta=0.0, knobs=STRAIGHT, greater_is_better=False)
    entropy = [log["entropy"] for log in run.logs if "reward" in log]
    assert run.ends.reports[5] and reported[1:] == entropy[:4] + entropy[5:] and reported[0] != reported[0]
    assert [log["extra/taken_back"] for log in run.logs if "reward" in log] == [0] * 9


def test_a_run_that_cannot_or_shall_not_go_back_by_its_entropy_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's rule, metric=None, and a Trainer that samples nothing."""
    monkeypatch.setattr(ExtraAdam, "report", lambda self, value: pytest.fail("reported"))
    runs = [Grpo(tmp_path / "paper", max_steps=6, knobs=PAPER), Grpo(tmp_path / "none", max_steps=6, metric=None)]
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows())
    use_extra_adam(trainer, **GATED)
    trainer.train()
    for logs in (runs[0].logs, runs[1].logs, trainer.state.log_history):
        assert any("extra/gate" in log for log in logs) and not any("extra/taken_back" in log for log in logs)


def test_a_trainer_that_logs_no_entropy_is_taken_for_watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As TRL's with Liger's loss."""
    trl = pytest.importorskip("trl")
    log = trl.GRPOTrainer.log

    def log_without(self: Any, *args: Any) -> None:
        self._metrics["train"].pop("entropy", None)
        log(self, *args)

    monkeypatch.setattr(trl.GRPOTrainer, "log", log_without)
    text = (
        r"0 values of 'entropy' counted in the cycle that ended after step 5.*metric=None.*Keys logged so far: .*'loss'"
    )
    with pytest.warns(RuntimeWarning, match=text):
        run = Grpo(tmp_path, max_steps=11, knobs=STRAIGHT)
    assert run.taken_back() == [] and not any("entropy" in log for log in run.logs)


def test_a_reward_that_collapses_after_a_jump_is_not_noticed(tmp_path: Path) -> None:
    def collapse(step: int, jumped: bool) -> float:
        return 0.0 if jumped else 1.0

    options = {"max_steps": 16, "knobs": STRAIGHT}
    with pytest.warns(RuntimeWarning, match=r"the metric fell from 1\.\d+ to 0\.0\d+ after the last jump"):
        run = Grpo(tmp_path / "watched", collapse, metric="reward", **options)
    jump = next(step for step, report in run.ends.reports.items() if report.jumped)
    assert jump == 10 and run.taken_back() == [13], "at the third value since"
    assert all(group["extra_scale"] < 1 for group in trained_groups(run.trainer))
    plain = Grpo(tmp_path / "plain", collapse, **options)
    assert trained_groups(plain.trainer)[0]["extra_scale"] == 1
    ours, theirs = ([(log["grad_norm"], log["reward"]) for log in some.logs[:-1]] for some in (run, plain))
    assert ours[:13] == theirs[:13] and ours[13:] != theirs[13:]


def test_the_batch_that_was_sampled_before_the_jump_is_held_against_it(tmp_path: Path) -> None:
    """The Trainer logs the reward of step 10 when its jump is made; the step's completions are older."""

    def falls_too_early(step: int, jumped: bool) -> float:
        return 0.0 if step in (9, 10, 11) else 1.0

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*rolled back")
        run = Grpo(tmp_path, falls_too_early, metric="reward", max_steps=15, knobs=STRAIGHT)
    assert run.ends.reports[10].jumped > 0 and run.taken_back() == []


def test_a_loss_counts_as_a_reward(tmp_path: Path) -> None:
    trainer = Moved(llama(), arguments(tmp_path, max_steps=16), train_dataset=rows(same=True))
    use_extra_adam(trainer, metric="loss", greater_is_better=False, **STRAIGHT)
    with pytest.warns(RuntimeWarning, match="rolled back"):
        trainer.train()
    assert [log["step"] for log in trainer.state.log_history if log.get("extra/taken_back")] == [13]


def rank_trainer(rank: int, folder: str) -> tuple[list[int], list[float], list[int]]:
    """Steps whose log tells of a jump taken back, weights, and steps that a report callback saw a jump of."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
    spy = Spy()
    args = arguments(Path(folder) / str(rank), max_steps=14, ddp_backend="gloo")
    assert args.world_size == WORLD
    trainer = Moved(llama(), args, train_dataset=rows(same=True), callbacks=[spy])
    use_extra_adam(trainer, metric="loss", greater_is_better=False, **STRAIGHT)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.train()
    taken_back = [log["step"] for log in trainer.state.log_history if log.get("extra/taken_back")]
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    return taken_back, weights, [log["step"] for log in spy.logs if "extra/gate" in log]


def test_ranks_take_back_apart_or_wait_for_each_other(tmp_path: Path) -> None:
    """Every rank logs, so every rank reports."""
    ranks = Ranks(str(tmp_path / "store"))
    try:
        first, second = ranks.run(rank_trainer, str(tmp_path), timeout=300)
    finally:
        ranks.close()
    assert first == second and first[0] == [13] and first[2] == [5, 10]


def test_an_evaluation_right_after_the_jump_is_left_out(tmp_path: Path) -> None:
    """It is of the weights after the jump, whenever the last log was: three of them are enough. The next log tells."""
    args = arguments(tmp_path, max_steps=13, logging_steps=4, eval_strategy="steps", eval_steps=1)
    trainer = Moved(llama(), args, train_dataset=rows(same=True), eval_dataset=rows(same=True)[:2])
    use_extra_adam(trainer, metric="eval_loss", greater_is_better=False, **STRAIGHT)
    with pytest.warns(RuntimeWarning, match="rolled back"):
        trainer.train()
    losses = [log["eval_loss"] > 10 for log in trainer.state.log_history if "eval_loss" in log]
    assert losses.index(True) + 1 == 10
    assert [log["step"] for log in trainer.state.log_history if log.get("extra/taken_back")] == [13]


@pytest.mark.parametrize(
    "options, metric, text",
    [
        ({"logging_steps": 5}, "reward", "0 values of 'reward' counted in the cycle that ended after step 5"),
        ({}, "rewards", r"0 values of 'rewards' counted.*Keys logged so far: .*'reward'"),
        ({"logging_steps": 5}, "auto", "0 values of 'entropy' counted in the cycle that ended after step 10"),
    ],
    ids=["seldom", "misspelt", "seldom, by default"],
)
def test_a_metric_that_can_never_tell_is_taken_without_a_word(
    options: dict[str, int], metric: str, text: str, tmp_path: Path
) -> None:
    with pytest.warns(RuntimeWarning, match=text) as seen:
        run = Grpo(tmp_path, metric=metric, max_steps=11, knobs=STRAIGHT, **options)
    assert len([w for w in seen if "counted in the cycle" in str(w.message)]) == 1 and run.taken_back() == []


def test_a_rule_that_cannot_go_back_fails_after_minutes_of_generation(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=rows())
    use_extra_adam(trainer, metric="loss", greater_is_better=False, **PAPER)
    with pytest.raises(RuntimeError, match="needs the drift estimate"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused"])
def test_use_extra_adam_trains_with_other_settings_than_the_trainer(optim: str, tmp_path: Path) -> None:
    """Learning rate, schedule, betas, epsilon, decay groups and implementation: without jumps all bits are the same."""
    options = {"learning_rate": 3e-3, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    models = []
    for ours in (False, True):
        args = arguments(tmp_path, optim=optim, lr_scheduler_type="cosine", **options)
        trainer = Trainer(llama(), args, train_dataset=rows())
        if ours:
            use_extra_adam(trainer, extra_steps=0)
        trainer.train()
        assert (type(trainer.optimizer.optimizer) is ExtraAdam) == ours
        assert [group["weight_decay"] for group in trained_groups(trainer)] == [0.1, 0.0]
        models.append(trainer.model)
    assert_same(list(models[0].parameters()), list(models[1].parameters()))


def test_use_extra_adam_comes_too_late_or_drops_the_users_choice(tmp_path: Path) -> None:
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(optimizer, None))
    with pytest.raises(RuntimeError, match="has an optimizer already, SGD"):
        use_extra_adam(trainer)
    trainer = Trainer(llama(), arguments(tmp_path, optim="adafactor"), train_dataset=rows())
    with pytest.raises(ValueError, match=r"args.optim asks for .*Adafactor"):
        use_extra_adam(trainer)
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=1), train_dataset=rows())
    use_extra_adam(trainer, lr=0.5, extra_every=4)
    trainer.train()
    assert {(group["initial_lr"], group["extra_every"]) for group in trained_groups(trainer)} == {(0.5, 4)}


def test_a_second_training_watches_the_first_ones_optimizer(tmp_path: Path) -> None:
    """One callback in two Trainers, one after the other."""
    callback = ExtraCallback()
    for folder in ("first", "second"):
        options = {"optimizer_cls_and_kwargs": (ExtraAdam, {"lr": 1e-3, **GATED})}
        args = arguments(tmp_path / folder, max_steps=4)
        trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[callback], **options)
        trainer.train()
        assert [log["step"] for log in trainer.state.log_history if "extra/gate" in log] == [3]
