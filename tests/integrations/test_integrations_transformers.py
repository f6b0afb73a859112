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
from helpers import GATED, K, N, assert_same
from ranks import WORLD, Ranks
from test_bugs_trainers import llama, tokens

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations import integration_utils

from extraopt import ExtraAdam, JumpReport
from extraopt.integrations.transformers import ExtraCallback, use_extra_adam
from extraopt.wrap import Extra

MEANS = ("length", "gate", "coherence", "drift_norm", "kl", "fall")
SUMS = ("jumped", "refused")
WATCHED: dict[str, Any] = {"extra_every": K, "extra_steps": N}
OPEN = {**WATCHED, "extra_gate": None}  # jumps, however noisy so few steps are


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


def trained_groups(trainer: Any) -> list[dict[str, Any]]:
    return trainer.optimizer.optimizer.param_groups


@pytest.mark.parametrize("every", [1, 4], ids=["each step", "every fourth step"])
def test_report_callbacks_miss_the_jumps(every: int, tmp_path: Path) -> None:
    """Those of report_to and the user's: all see the same as the log history does, wherever they stand."""
    first, last, ends = Spy(), Spy(), Ends()
    trainer = Trainer(
        llama(), arguments(tmp_path, max_steps=13, logging_steps=every), train_dataset=rows(same=True),
        callbacks=[first],
    )  # fmt: skip
    use_extra_adam(trainer, lr=1e-3, **OPEN)
    for callback in ends, last:
        trainer.add_callback(callback)
    trainer.train()
    assert list(ends.reports) == [3, 6, 9, 12] and ends.reports[12].jumped > 0
    # the last one tells of the whole run, and a printer drops a part of it
    assert first.logs[:-1] == trainer.state.log_history[:-1] == last.logs[:-1]
    logged = {log["step"]: log for log in first.logs if "extra/gate" in log}
    assert list(logged) == {1: [3, 6, 9, 12], 4: [4, 8, 12]}[every]
    covered = {4: [3], 8: [6], 12: [9, 12]} if every == 4 else {end: [end] for end in ends.reports}
    for step, of in covered.items():
        for key in MEANS + SUMS:
            values = [getattr(ends.reports[end], key) for end in of]
            wanted = sum(values) / (len(values) if key in MEANS else 1)
            assert logged[step][f"extra/{key}"] == pytest.approx(wanted), (step, key)
    json.dumps(trainer.state.log_history)


def test_what_was_not_measured_is_logged_as_nan(tmp_path: Path) -> None:
    """NaN is no JSON, and report callbacks choke on it. A callback of the user's comes after those of report_to."""
    before = Spy()
    trainer = Trainer(
        llama(), arguments(tmp_path, max_steps=4), train_dataset=rows(), callbacks=[before, ExtraCallback()],
        optimizer_cls_and_kwargs=(ExtraAdam, {**GATED, "extra_gate": None}),
    )  # fmt: skip
    trainer.train()
    (logged,) = (log for log in trainer.state.log_history if "extra/gate" in log)
    assert logged["extra/length"] == N and not {"extra/kl", "extra/fall"} & set(logged)
    assert not any("extra/gate" in log for log in before.logs)


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
    use_extra_adam(trainer, **OPEN)
    trainer.train()
    assert scalars["train/loss"] == list(range(1, 13))
    assert all(scalars[f"train/extra/{key}"] == [3, 6, 9, 12] for key in MEANS + SUMS)


def test_jumps_since_the_last_log_are_lost_at_the_end(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=7, logging_steps=4), train_dataset=rows())
    use_extra_adam(trainer, **WATCHED)
    trainer.train()
    assert [log["step"] for log in trainer.state.log_history if "extra/gate" in log] == [4, 7]
    assert "train_runtime" in trainer.state.log_history[-1] and "extra/gate" in trainer.state.log_history[-1]


def test_evaluation_alone_fails_or_logs_jumps(tmp_path: Path) -> None:
    """Outside of training there is no optimizer to watch; during training jumps belong to the training logs."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 2, "max_steps": 6}
    trainer = Trainer(llama(), arguments(tmp_path, **options), train_dataset=rows(), eval_dataset=rows()[:4])
    use_extra_adam(trainer, **WATCHED)
    trainer.evaluate()
    trainer.train()
    before = trainer.state.log_history[:]
    trainer.evaluate()
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
    optimizer = Extra(torch.optim.SGD(model.parameters(), lr=1e-2), **OPEN)
    trainer = Trainer(
        model, arguments(tmp_path), train_dataset=rows(same=True), optimizers=(optimizer, None),
        callbacks=[ExtraCallback()],
    )  # fmt: skip
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
        llama(), args, train_dataset=rows(), optimizer_cls_and_kwargs=(ExtraAdam, {"lr": 1e-3, **WATCHED}),
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
        self, folder: Path, resume: Path | None = None, watch: bool = True, adamw: bool = False, **options: Any
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
        hyperparameters = {"lr": 1e-3, **options.pop("hyperparameters", WATCHED)}
        trainer, config = (trl.RLOOTrainer, trl.RLOOConfig) if options.pop("rloo", False) else (
            trl.GRPOTrainer, trl.GRPOConfig
        )  # fmt: skip

        def score(completion_ids: list[list[int]], **_: Any) -> list[float]:
            self.generated.append(self.trainer.state.global_step)
            return [0.01 * (sum(ids) % 7) for ids in completion_ids]

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
        if adamw:
            self.trainer.optimizer_cls_and_kwargs = (torch.optim.AdamW, {"lr": 1e-3})
        elif watch:
            use_extra_adam(self.trainer, **hyperparameters)
        else:
            self.trainer.optimizer_cls_and_kwargs = (ExtraAdam, hyperparameters)
        if not adamw:
            self.trainer.add_callback(self.ends)
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        self.logs = self.trainer.state.log_history
        self.optimizer = self.trainer.optimizer.optimizer


@pytest.mark.parametrize(
    "options, every",
    [
        ({}, 3),
        ({"num_iterations": 2}, 4),
        ({"num_iterations": 2, "rloo": True, "beta": 0.0}, 4),
        ({"steps_per_generation": 5}, 5),
        ({"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2}, 4),
        (
            {
                "steps_per_generation": 3,
                "gradient_accumulation_steps": 2,
                "hyperparameters": {**WATCHED, "extra_every": 4},
            },
            6,
        ),
        ({"steps_per_generation": 1, "gradient_accumulation_steps": 2}, 3),
    ],
    ids=["plain", "iterations", "RLOO", "generation", "all", "within accumulation", "several in a step"],
)
def test_a_jump_falls_between_two_steps_on_one_batch_of_completions(
    options: dict[str, Any], every: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = options.get("hyperparameters", WATCHED)["extra_every"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ExtraCallback")
        run = Grpo(tmp_path, max_steps=2 * every + 1, **options)
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

    options = {
        "num_iterations": 2,
        "max_steps": 8,
        "logging_steps": 3,
        "hyperparameters": {**WATCHED, "extra_every": 50},
    }
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


@pytest.mark.parametrize("saved", ["save_only_model", "AdamW"])
@pytest.mark.parametrize("at", [4, 6], ids=["between batches", "within a batch"])
def test_a_run_resumed_without_cycles_of_its_own_ends_them_with_the_batches_of_completions(
    saved: str, at: int, tmp_path: Path
) -> None:
    """Four optimizer steps on each batch, whose first comes with the first step after the checkpoint."""
    options = {"num_iterations": 4, "save_strategy": "steps", "save_steps": at}
    before: dict[str, Any] = {"adamw": True} if saved == "AdamW" else {saved: True}
    Grpo(tmp_path / "first", max_steps=at, **before, **options)
    checkpoint = tmp_path / "first" / f"checkpoint-{at}"
    assert (checkpoint / "optimizer.pt").exists() == (saved != "save_only_model")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="ExtraCallback")
        run = Grpo(tmp_path / "second", resume=checkpoint, max_steps=at + 9, hyperparameters=OPEN, **options)
    assert run.generated == [at, at + 4, at + 8] and list(run.ends.reports) == [at + 4, at + 8]
    assert run.ends.reports[at + 8].jumped > 0
    applied = 0 if saved == "save_only_model" else at
    assert [report.step for report in run.ends.reports.values()] == [applied + 4, applied + 8]
    assert {group["extra_every"] for group in trained_groups(run.trainer)} == {4}


def rank_trainer(rank: int, folder: str) -> tuple[list[float], list[float], list[int], list[str]]:
    """Lengths of jumps, weights, steps that a report callback saw a jump of, and warnings of ours."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
    spy, ends = Spy(), Ends()
    args = arguments(Path(folder) / str(rank), max_steps=14, ddp_backend="gloo")
    assert args.world_size == WORLD
    trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[spy])
    use_extra_adam(trainer, **OPEN)
    trainer.add_callback(ends)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer.train()
    assert all(report.kl > 0 for report in ends.reports.values())
    weights = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    lengths = [report.length for report in ends.reports.values()]
    ours = [str(w.message) for w in seen if "extra" in str(w.message).lower()]
    return lengths, weights, [log["step"] for log in spy.logs if "extra/gate" in log], ours


def test_ranks_of_a_trainer_jump_apart(tmp_path: Path) -> None:
    """Each has a batch of its own, and DistributedDataParallel around the model that is looked at."""
    ranks = Ranks(str(tmp_path / "store"))
    try:
        first, second = ranks.run(rank_trainer, str(tmp_path), timeout=300)
    finally:
        ranks.close()
    assert first == second and first[2] == [3, 6, 9, 12] and all(first[0]) and not first[3]


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


HYPERPARAMETERS = ("lr", "betas", "eps", "weight_decay")
SPACE: list[dict[str, Any]] = [  # of three trials
    {"learning_rate": 1e-3, "adam_beta1": 0.8, "adam_epsilon": 1e-7, "weight_decay": 0.1},
    {"learning_rate": 3e-2, "adam_beta1": 0.5, "adam_epsilon": 1e-6, "weight_decay": 0.0},
    {"learning_rate": 1e-2, "adam_beta1": 0.9, "adam_epsilon": 1e-5, "weight_decay": 0.3},
]


class Trials(TrainerCallback):
    """Of each training: what was asked for, what the groups began with, and the weights at its end."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []
        self.groups: list[list[Any]] = []
        self.weights: list[list[torch.Tensor]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        groups = optimizer.optimizer.param_groups
        begun = [[group.get(key) for key in ("initial_lr", *HYPERPARAMETERS[1:])] for group in groups]
        self.groups.append([*begun, *([p.shape for p in group["params"]] for group in groups)])

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.weights.append([p.detach().clone() for p in model.parameters()])


def searched(folder: Path, how: str, ours: bool, hyperparameters: dict[str, Any]) -> Trials:
    """Three trials, each with hyperparameters and a model of its own, by AdamW or by ExtraAdam."""
    trials, number = Trials(), iter([0, 0, 1, 2])  # the Trainer makes a model when it is built, too

    def model_init(trial: Any = None) -> Any:
        i = next(number)
        model = llama(i)
        model.model.embed_tokens.weight.requires_grad_(i < 2)  # other decay groups
        return model

    trainer = Trainer(
        model_init=model_init, args=arguments(folder, max_steps=4, learning_rate=5e-5), train_dataset=rows(same=True),
        eval_dataset=rows()[:2], callbacks=[trials],
    )  # fmt: skip
    if ours:
        use_extra_adam(trainer, **hyperparameters)
    if how == "optuna":
        import optuna

        def space(trial: Any) -> dict[str, Any]:
            asked = {
                "learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2, log=True),
                "adam_beta1": trial.suggest_categorical("adam_beta1", [0.5, 0.8, 0.9]),
                "adam_epsilon": trial.suggest_float("adam_epsilon", 1e-8, 1e-5, log=True),
                "weight_decay": trial.suggest_float("weight_decay", 0.01, 0.3),
            }
            trials.asked.append(asked)
            return asked

        sampler = optuna.samplers.RandomSampler(seed=0)
        trainer.hyperparameter_search(space, backend="optuna", n_trials=len(SPACE), sampler=sampler)
    for case in SPACE if how == "arguments" else ():
        trials.asked.append(case)
        for key, value in case.items():
            setattr(trainer.args, key, value)
        trainer.train()
    return trials


@pytest.mark.parametrize("how", [pytest.param("optuna", marks=pytest.mark.slow), "arguments"])
def test_each_trial_of_a_hyperparameter_search_trains_by_its_own_hyperparameters(how: str, tmp_path: Path) -> None:
    """Without jumps all bits are AdamW's: learning rate, betas, epsilon and the decay groups of that trial's model."""
    if how == "optuna":
        pytest.importorskip("optuna", reason="optuna is not installed")
    ours = searched(tmp_path, how, True, {"extra_steps": 0})
    theirs = searched(tmp_path, how, False, {})
    assert ours.asked == theirs.asked and len({case["learning_rate"] for case in ours.asked}) == len(ours.groups) == 3
    for case, groups in zip(ours.asked, ours.groups):
        rest = [(case["adam_beta1"], 0.999), case["adam_epsilon"]]
        for group, decay in zip(groups, (case["weight_decay"], 0.0)):
            assert group == [case["learning_rate"], *rest, decay]
    assert ours.groups == theirs.groups and len({len(groups[2]) for groups in ours.groups}) == 2
    assert_same(ours.weights, theirs.weights)
    jumping = searched(tmp_path, how, True, {**OPEN, "extra_kl": None, "extra_steps": 5})
    assert jumping.groups == theirs.groups
    assert not any(all(map(torch.equal, *pair)) for pair in zip(jumping.weights, theirs.weights))


def test_what_use_extra_adam_was_given_holds_in_every_trial_and_a_warning_says_so(tmp_path: Path) -> None:
    with pytest.warns(RuntimeWarning, match="^extraopt: the Trainer's lr is 0.001 by now, .* holds, 0.25: a") as seen:
        ours = searched(tmp_path, "arguments", True, {"lr": 0.25, "extra_steps": 0})
    assert [groups[0][0] for groups in ours.groups] == [0.25] * 3
    assert len([w for w in seen if str(w.message).startswith("extraopt")]) == 3


def test_a_trial_sets_up_the_optimizer_that_its_arguments_ask_for(tmp_path: Path) -> None:
    """By the Trainer's own `_hp_search_setup`, as each of its backends does; and of two calls the second holds."""
    from transformers.trainer_utils import HPSearchBackend

    trainer = Trainer(model_init=lambda: llama(), args=arguments(tmp_path), train_dataset=rows())
    use_extra_adam(trainer, extra_every=4)
    use_extra_adam(trainer, extra_every=5)
    trainer.hp_search_backend = HPSearchBackend.RAY
    for case in SPACE:
        trainer._hp_search_setup(dict(case))
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        assert type(optimizer) is ExtraAdam
        wanted = [case["learning_rate"], (case["adam_beta1"], 0.999), case["adam_epsilon"]]
        for group, decay in zip(optimizer.param_groups, (case["weight_decay"], 0.0), strict=True):
            assert [group[key] for key in HYPERPARAMETERS] == [*wanted, decay]
            assert group["extra_every"] == 5
    trainer._hp_search_setup({"optim": "adafactor"})
    trainer.optimizer = None
    with pytest.raises(ValueError, match=r"args.optim asks for .*Adafactor"):
        trainer.create_optimizer()


def test_a_second_training_watches_the_first_ones_optimizer(tmp_path: Path) -> None:
    """One callback in two Trainers, one after the other."""
    callback = ExtraCallback()
    for folder in ("first", "second"):
        options = {"optimizer_cls_and_kwargs": (ExtraAdam, {"lr": 1e-3, **WATCHED})}
        args = arguments(tmp_path / folder, max_steps=4)
        trainer = Trainer(llama(), args, train_dataset=rows(), callbacks=[callback], **options)
        trainer.train()
        assert [log["step"] for log in trainer.state.log_history if "extra/gate" in log] == [3]
