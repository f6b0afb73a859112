"""Trainers as their users run them, with the optimizer's defaults: jumps are measured, and nothing is warned of."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from test_bugs_trainers import adapted, llama, tokens
from test_integrations_transformers import Ends, arguments, rows

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")

from transformers import Trainer

from extraopt import ExtraAdam, JumpReport
from extraopt.integrations.transformers import ExtraCallback, use_extra_adam

STEPS = 20  # four cycles


@pytest.fixture(autouse=True)
def warnings_of_ours_fail() -> Iterator[None]:
    torch.nn.modules.module._global_forward_pre_hooks.clear()  # of optimizers of earlier tests
    with warnings.catch_warnings():
        for message in ("extraopt", "ExtraCallback", ".*global hooks on modules"):
            warnings.filterwarnings("error", message=message)
        yield


def check(reports: dict[int, JumpReport], ends: int = STEPS // 5) -> None:
    assert len(reports) == ends
    jumps = [report for report in reports.values() if report.length]
    assert jumps, reports
    assert all(0 < report.kl <= 0.02 and 0 <= report.fall <= 0.3 for report in jumps), jumps


@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_accumulation_steps": 2}, {"gradient_checkpointing": True}, {"eval_steps": 3}],
    ids=["plain", "bf16", "accumulation", "checkpointing", "evaluation"],
)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_the_trainer_of_transformers(lora: bool, options: dict[str, Any], tmp_path: Path) -> None:
    if "eval_steps" in options:
        options = {**options, "eval_strategy": "steps"}
    args = arguments(tmp_path, max_steps=STEPS, learning_rate=1e-2 if lora else 3e-4, **options)
    trainer = Trainer(
        adapted() if lora else llama(), args, train_dataset=rows(same=True), eval_dataset=rows(same=True)[:2]
    )
    use_extra_adam(trainer)
    ends = Ends()
    trainer.add_callback(ends)
    trainer.train()
    check(ends.reports)
    logged = [log for log in trainer.state.log_history if "extra/kl" in log]
    assert logged and all({"extra/length", "extra/fall", "extra/gate"} <= set(log) for log in logged)


def test_a_trainer_forgets_how_to_get_logits(tmp_path: Path) -> None:
    trainer = Trainer(llama(), arguments(tmp_path, max_steps=STEPS, learning_rate=3e-4), train_dataset=rows(same=True))
    use_extra_adam(trainer)
    seen = []
    trainer.create_optimizer()
    trainer.optimizer.watch(logits=lambda output: seen.append(1) or output.logits)
    ends = Ends()
    trainer.add_callback(ends)
    trainer.train()
    check(ends.reports)
    assert len(seen) >= 2 * (STEPS // 5 - 1)


def test_a_trainer_that_compiles_its_model(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=STEPS, learning_rate=1e-3, torch_compile=True, torch_compile_backend="eager")
    trainer = Trainer(llama(), args, train_dataset=rows(same=True))
    use_extra_adam(trainer)
    ends = Ends()
    trainer.add_callback(ends)
    trainer.train()
    check(ends.reports)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
@pytest.mark.parametrize("name", ["SFT", "DPO", "KTO", "GRPO", "RLOO"])
def test_trainers_of_trl(name: str, lora: bool, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[hf]'")
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from datasets import Dataset
    from test_peft_trainers import QUIET, TARGETS, TRL, words
    from transformers import LlamaForCausalLM

    llama().save_pretrained(tmp_path / "base")  # where trainers look for the reference model
    args = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2 if lora else 3e-4, "seed": 0}
    options: dict[str, Any] = {}
    if name in ("GRPO", "RLOO"):
        args.update(num_generations=4, max_completion_length=6)
        options["reward_funcs"] = lambda completion_ids, **_: [float(ids.count(5)) for ids in completion_ids]
    data = {key: values[:4] for key, values in TRL.get(name, TRL["RLOO"]).items()}
    if name == "KTO":
        data["label"] = [True, False, True, False]
    trainer = getattr(trl, f"{name}Trainer")(
        LlamaForCausalLM.from_pretrained(tmp_path / "base"),
        args=getattr(trl, f"{name}Config")(str(tmp_path), bf16=False, **args, **QUIET),
        processing_class=words(), train_dataset=Dataset.from_dict(data), **options,
        peft_config=peft.LoraConfig(**TARGETS) if lora else None,
    )  # fmt: skip
    hyperparameters = {"extra_gate": None} if name in ("GRPO", "RLOO") else {}  # their gradients are noise here
    use_extra_adam(trainer, **hyperparameters)
    ends = Ends()
    trainer.add_callback(ends)
    trainer.train()
    check(ends.reports)


def test_a_reward_model_is_refused_in_words(tmp_path: Path) -> None:
    """It gives one number, no distribution."""
    from transformers import LlamaForSequenceClassification

    config = llama().config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    data = [{"input_ids": tokens(i)[0], "labels": torch.tensor([1.0])} for i in range(8)]
    args = arguments(tmp_path, max_steps=STEPS, learning_rate=1e-3)
    trainer = Trainer(model, args, train_dataset=data)
    use_extra_adam(trainer)
    with pytest.warns(RuntimeWarning, match=r"have 1 columns, which are no distribution.*watch\(model, logits") as seen:
        trainer.train()
    assert len([w for w in seen if "extraopt" in str(w.message)]) == 1


def test_the_callback_alone_finds_what_the_trainer_prepared(tmp_path: Path) -> None:
    trainer = Trainer(
        llama(), arguments(tmp_path, max_steps=STEPS), train_dataset=rows(same=True),
        optimizer_cls_and_kwargs=(ExtraAdam, {"lr": 1e-3}), callbacks=[ExtraCallback()],
    )  # fmt: skip
    trainer.train()
    logged = [log for log in trainer.state.log_history if log.get("extra/length")]
    assert logged and all(log["extra/kl"] > 0 for log in logged)


@pytest.mark.parametrize("to", ["tensorboard", "wandb"])
def test_what_reports_are_sent_to_gets_the_jumps(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(to, reason=f"{to} is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    args = arguments(tmp_path, max_steps=STEPS, report_to=to, learning_rate=1e-3)
    trainer = Trainer(llama(), args, train_dataset=rows(same=True))
    use_extra_adam(trainer)
    trainer.train()
    if to == "tensorboard":
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        (file,) = tmp_path.rglob("events.out.tfevents*")
        seen = set(EventAccumulator(str(file)).Reload().Tags()["scalars"])
    else:
        seen = set(sys.modules["wandb"].run.summary.keys())
        sys.modules["wandb"].finish()
    assert {f"train/extra/{key}" for key in ("length", "kl", "fall", "gate")} <= seen


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("manual", [False, True], ids=["automatic", "manual"])
@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
def test_lightning(manual: bool, precision: str, tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.reports = llama(), {}
            self.automatic_optimization = not manual

        def configure_optimizers(self) -> ExtraAdam:
            return ExtraAdam(self.model.parameters(), lr=1e-3)

        def training_step(self, batch: Any, index: int) -> Any:
            loss = self.model(input_ids=tokens(0), labels=tokens(0)).loss
            if not manual:
                return loss
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            last = self.optimizers(use_pl_optimizer=False).last_jump
            if last is not None and last not in self.reports.values():
                self.reports[index] = last

        def validation_step(self, batch: Any, index: int) -> None:
            self.model(input_ids=tokens(1))

    module = Module()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = lightning.Trainer(
        accelerator="cpu", max_steps=STEPS, precision=precision, default_root_dir=tmp_path, val_check_interval=7,
        limit_val_batches=1, **quiet,
    )  # fmt: skip
    loader = torch.utils.data.DataLoader(range(100), batch_size=None)
    trainer.fit(module, loader, loader)
    check(module.reports)
    assert module.model.training and not math.isnan(trainer.optimizers[0].last_jump.kl)


@pytest.mark.parametrize("told", [False, True])
def test_lightnings_ddp_is_refused_in_words_unless_told_the_model(told: bool, tmp_path: Path) -> None:
    """It puts `training_step` in the place of the module's forward for a call, which can't be called again later."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama()

        def configure_optimizers(self) -> ExtraAdam:
            optimizer = ExtraAdam(self.parameters(), lr=1e-3)
            if told:
                optimizer.watch(self.model, process_group=torch.distributed.group.WORLD)
            return optimizer

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(input_ids=batch, labels=batch).loss

    trainer = lightning.Trainer(
        accelerator="cpu", devices=1, strategy="ddp", max_steps=STEPS, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    try:
        # Lightning leaves MASTER_PORT and its like there, by which later trainers of this process would be ranks
        with patch.dict(os.environ), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.fit(Module(), torch.utils.data.DataLoader([tokens(0)] * STEPS, batch_size=None))
    finally:
        torch.distributed.destroy_process_group()
    said = [str(w.message) for w in caught if "extraopt" in str(w.message)]
    last = trainer.optimizers[0].last_jump
    if told:
        assert not said and last.length > 0 and 0 < last.kl <= 0.02
    else:
        assert len(said) == 1 and "in place of Module's forward, as by Lightning under DDP" in said[0]
        assert last.length == 20 and math.isnan(last.kl)
