"""PEFT's adapters and TRL's trainers, unmodified, on a model of a few hundred weights."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import PAPER, K, N, assert_same_run, by_hand
from test_bugs_trainers import ADAPTERS, OPEN, adapted, llama, tokens

pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[hf]'")
pytest.importorskip("peft", reason="peft is not installed: pip install '.[hf]'")

from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft.optimizers import create_loraplus_optimizer
from transformers import Trainer, TrainerCallback, TrainingArguments

from extraopt import ExtraAdam
from extraopt.integrations.transformers import ExtraCallback, use_extra_adam

QUIET: dict[str, Any] = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
TARGETS: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 2, "target_modules": ["q_proj", "v_proj"]}
SWITCH = 4  # optimizer steps after which the run of two adapters turns to the other one
KINDS = {
    "rsLoRA": [3, 6, 9, 12],
    "DoRA": [3, 6, 9, 12],
    "modules_to_save": [3, 6, 9, 12],
    "LoRA+": [3, 6, 9, 12],
    "bf16": [3, 6, 9, 12],
    "fp32 on bf16": [3, 6, 9, 12],
    "4 bits": [3, 6, 9, 12],
    "two adapters": [3, 7, 10],  # each has a cycle of its own, which stands still while the other one is trained
}


def in_4_bits() -> Any:
    """The base quantized by bitsandbytes."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    from transformers import BitsAndBytesConfig, LlamaForCausalLM

    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    with tempfile.TemporaryDirectory() as folder:
        llama().save_pretrained(folder)
        model = LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu")
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def build(kind: str) -> Any:
    if kind in ADAPTERS:
        return adapted(kind)
    if kind == "LoRA+":
        return get_peft_model(
            llama(), LoraConfig(**{**TARGETS, "target_modules": ["q_proj", "v_proj", "embed_tokens"]})
        )
    if kind == "4 bits":
        return get_peft_model(in_4_bits(), LoraConfig(**TARGETS))
    if "bf16" in kind:
        own = kind != "bf16"
        model = get_peft_model(llama().to(torch.bfloat16), LoraConfig(**TARGETS), autocast_adapter_dtype=own)
        model.load_adapter = partial(model.load_adapter, autocast_adapter_dtype=own)  # by which a Trainer resumes
        return model
    model = adapted()
    model.add_adapter("other", LoraConfig(**TARGETS))
    return model


@pytest.fixture(autouse=True, scope="module")
def libraries_are_not_collected_anew_with_each_trainer() -> Iterator[None]:
    """accelerate collects garbage whenever training begins, which takes longer than a run of these."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Switch(TrainerCallback):
    """Trains one adapter, then the other, and so on."""

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        model.set_adapter(("default", "other")[state.global_step // SWITCH % 2])


class Watch(TrainerCallback):
    """Global steps that ended a cycle, and the gradients and weights of every step."""

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.grads: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        self.last: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
        self.last = optimizer.optimizer.last_jump

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
        self.grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: Any, optimizer: Any, **_: Any) -> None:
        self.weights.append({n: p.detach().clone() for n, p in model.named_parameters()})
        if optimizer.optimizer.last_jump is not self.last:
            self.last = optimizer.optimizer.last_jump
            self.ends.append(state.global_step + 1)


class Run:
    """A finished run of transformers' Trainer."""

    def __init__(
        self,
        kind: str,
        folder: Path,
        rule: dict[str, Any],
        resume: Path | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        **options: Any,
    ) -> None:
        self.model = build(kind)
        self.start = {n: p.detach().clone() for n, p in self.model.named_parameters()}
        hyperparameters = {"lr": 1e-2, **rule}
        how: dict[str, Any] = {"optimizer_cls_and_kwargs": (ExtraAdam, hyperparameters)}
        if kind == "LoRA+":
            groups = {"loraplus_lr_ratio": 4, "loraplus_lr_embedding": 1e-3, "loraplus_weight_decay": 0.1}
            how = {"optimizers": (create_loraplus_optimizer(self.model, ExtraAdam, **groups, **hyperparameters), None)}
        elif kind == "two adapters":
            params = [p for n, p in self.model.named_parameters() if "lora_" in n]
            how = {"optimizers": (ExtraAdam(params, **hyperparameters), None)}
        self.watch = Watch()
        switch = [Switch()] if kind == "two adapters" else []
        data = [{"input_ids": tokens(i)[0], "labels": tokens(i)[0]} for i in range(64)]
        sizes = {"max_steps": 12, "save_strategy": "no", "per_device_train_batch_size": 2}
        self.trainer = Trainer(
            self.model,
            TrainingArguments(str(folder), **{**sizes, **QUIET, **options}),
            train_dataset=data,
            eval_dataset=data[:4],
            callbacks=[*switch, self.watch, *callbacks],
            **how,
        )
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        self.optimizer = self.trainer.optimizer.optimizer

    def adapters(self) -> set[str]:
        return {n for n in self.start if "lora_" in n or ".modules_to_save." in n}

    def assert_base_untouched(self) -> None:
        now = dict(self.model.named_parameters())
        base = self.start.keys() - self.adapters()
        assert base and now.keys() == self.start.keys()
        for name in base:
            assert torch.equal(now[name], self.start[name]), name
        held = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        assert held == {id(now[name]) for name in self.adapters()}, "the optimizer holds the adapters' weights"


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_adapter_takes_another_path_or_the_base_moves(kind: str, tmp_path: Path) -> None:
    """Stopped within a cycle, with jumps before and after."""
    whole = Run(kind, tmp_path / "whole", OPEN, save_strategy="steps", save_steps=5)
    resumed = Run(kind, tmp_path / "resumed", OPEN, resume=tmp_path / "whole" / "checkpoint-5")
    assert whole.watch.ends == KINDS[kind]
    assert resumed.watch.ends == [step for step in KINDS[kind] if step > 5]
    jump = whole.optimizer.last_jump
    assert jump.jumped == len(whole.adapters()) / (1 + (kind == "two adapters")) and jump.refused == 0
    for run in whole, resumed:
        run.assert_base_untouched()
        assert {run.start[name].dtype for name in run.adapters()} == {
            torch.bfloat16 if kind == "bf16" else torch.float32
        }
    if kind == "LoRA+":
        assert [len(group["params"]) for group in resumed.optimizer.param_groups] == [2, 2, 2, 0]
        assert [group["initial_lr"] for group in resumed.optimizer.param_groups] == [1e-2, 1e-3, 4e-2, 4e-2]
    assert_same_run(whole.model, whole.optimizer, resumed.model, resumed.optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_of_adapters_are_counted_as_steps(kind: str, tmp_path: Path) -> None:
    run = Run(kind, tmp_path, OPEN, max_steps=7, gradient_accumulation_steps=4)
    assert run.watch.ends == [step for step in KINDS[kind] if step <= 7]
    applied = {int(state["step"]) for state in run.optimizer.state.values()}
    assert applied == ({3, 4} if kind == "two adapters" else {7})
    run.assert_base_untouched()


def test_an_adapter_that_is_switched_off_jumps_or_loses_its_cycle(tmp_path: Path) -> None:
    """Each adapter goes the way it goes alone, by the gradients that it got."""
    run = Run("two adapters", tmp_path, PAPER, lr_scheduler_type="constant")
    for adapter, turns in (("default", (0, 2)), ("other", (1,))):
        names = sorted(name for name in run.adapters() if f".{adapter}." in name)
        steps = [step for turn in turns for step in range(turn * SWITCH, (turn + 1) * SWITCH)]
        for step in range(12):
            assert run.watch.grads[step].keys() & set(names) == (set(names) if step in steps else set())
            if step and step not in steps:
                for name in names:
                    assert torch.equal(run.watch.weights[step][name], run.watch.weights[step - 1][name]), (step, name)
        grads = [[run.watch.grads[step][name] for name in names] for step in steps]
        wanted = by_hand([run.start[name] for name in names], grads, lr=1e-2)
        for name, p in zip(names, wanted):
            torch.testing.assert_close(run.watch.weights[-1][name], p, msg=name)


def test_adapters_that_a_resume_casts_to_float32_keep_their_bfloat16_anchors(tmp_path: Path) -> None:
    """PEFT casts what it loads, unless told otherwise: the parameters are float32 when the optimizer's state comes."""
    whole = Run("bf16", tmp_path / "whole", OPEN, save_strategy="steps", save_steps=5)

    class Forgets(TrainerCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, model: Any, **_: Any) -> None:
            del model.load_adapter

    options = {"resume": tmp_path / "whole" / "checkpoint-5", "callbacks": [Forgets()]}
    resumed = Run("bf16", tmp_path / "resumed", OPEN, **options)
    assert resumed.watch.ends == [6, 9, 12] and resumed.optimizer.last_jump.jumped == 4
    for run, dtype in (whole, torch.bfloat16), (resumed, torch.float32):
        for p, state in run.optimizer.state.items():
            assert {p.dtype, state["exp_avg"].dtype, state["extra_anchor"].dtype, state["extra_estimate"].dtype} == {
                dtype
            }
            assert p.isfinite().all()


@pytest.mark.parametrize("how", ["callback", "by hand"])
@pytest.mark.parametrize("kind", ["DoRA", "modules_to_save", "LoRA+"])
def test_the_best_model_is_extrapolated_from_the_last_one_when_training_goes_on(
    kind: str, how: str, tmp_path: Path
) -> None:
    """`load_best_model_at_end` writes older weights into the parameters in mid-cycle, and `train()` is called again."""
    options = {
        "max_steps": 5, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2, "eval_steps": 2,
        "eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "eval_loss",
        "greater_is_better": True,  # so that the best one is not the last one
    }  # fmt: skip
    run = Run(kind, tmp_path, PAPER, callbacks=[ExtraCallback()] if how == "callback" else [], **options)
    assert run.watch.ends == [3]
    step = int(run.trainer.state.best_model_checkpoint.rpartition("-")[2])
    best = {name: run.watch.weights[step - 1][name] for name in run.adapters()}
    now = dict(run.model.named_parameters())
    for name in best:
        assert torch.equal(now[name], best[name]) and not torch.equal(now[name], run.watch.weights[-1][name]), name
    run.assert_base_untouched()

    if how == "by hand":
        run.optimizer.reset_anchor()
    run.watch.ends.clear()
    run.watch.weights.clear()
    run.trainer.args.load_best_model_at_end = False
    run.trainer.train()
    assert run.trainer.optimizer.optimizer is run.optimizer and run.watch.ends == [3]
    moved = torch.stack([(run.watch.weights[2][name] - best[name]).norm() for name in best]).norm()
    torch.testing.assert_close(float(moved), (1 + N / K) * run.optimizer.last_jump.drift_norm, rtol=1e-4, atol=0)
    run.assert_base_untouched()


def words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i + 3 for i in range(13)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )


def sentences(offset: int) -> list[str]:
    return [" ".join(str((i * j + offset) % 13) for j in range(1, 5)) for i in range(64)]


TRL: dict[str, dict[str, list[Any]]] = {  # the columns of each trainer's data
    "SFT": {"text": sentences(0)},
    "Reward": {"chosen": sentences(0), "rejected": sentences(1)},
    "DPO": {"prompt": sentences(2), "chosen": sentences(0), "rejected": sentences(1)},
    "KTO": {"prompt": sentences(2), "completion": sentences(0), "label": [i % 2 == 0 for i in range(64)]},
    "RLOO": {"prompt": sentences(0)},
}


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "whole"])
@pytest.mark.parametrize("name", TRL)
def test_a_trl_trainer_resumes_with_another_path_or_moves_what_is_frozen(name: str, lora: bool, tmp_path: Path) -> None:
    """As the README has it: by `optimizer_cls_and_kwargs` where the trainer takes one, else by `use_extra_adam`."""
    trl = pytest.importorskip("trl", reason="trl is not installed: pip install '.[hf]'")
    from datasets import Dataset
    from transformers import LlamaForCausalLM, LlamaForSequenceClassification

    takes_a_class = name in ("SFT", "Reward")
    llama().save_pretrained(tmp_path / "base")  # where trainers look for the reference model

    def run(folder: Path, resume: Path | None = None) -> tuple[Any, list[int]]:
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        if name == "Reward":
            model.config.num_labels = 1
            torch.manual_seed(0)
            model = LlamaForSequenceClassification(model.config)
        args = {"max_steps": 7, "save_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "bf16": False}
        targets, options = dict(TARGETS), {}
        if name == "Reward":
            targets.update(task_type="SEQ_CLS", modules_to_save=["score"])
        if name == "RLOO":
            args.update(num_generations=4, max_completion_length=3)
            options["reward_funcs"] = lambda completion_ids, **_: [float(sum(ids) % 7) for ids in completion_ids]
        if takes_a_class:
            options["optimizer_cls_and_kwargs"] = (ExtraAdam, {"lr": 1e-2, **OPEN})
        trainer = getattr(trl, f"{name}Trainer")(
            model, args=getattr(trl, f"{name}Config")(str(folder), **args, **QUIET), processing_class=words(),
            train_dataset=Dataset.from_dict(TRL[name]), peft_config=LoraConfig(**targets) if lora else None, **options,
        )  # fmt: skip
        if not takes_a_class:
            use_extra_adam(trainer, **OPEN)
        watch = Watch()
        trainer.add_callback(watch)
        frozen = {n: p for n, p in trainer.model.named_parameters() if not p.requires_grad}
        reference = getattr(trainer, "ref_model", None)
        assert (reference is not None) == (not lora and not takes_a_class)
        frozen |= dict(reference.named_parameters(prefix="reference")) if reference is not None else {}
        before = {n: p.detach().clone() for n, p in frozen.items()}
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        assert bool(frozen) == (lora or not takes_a_class)
        for n, p in frozen.items():
            assert torch.equal(p, before[n]), n
        return trainer, watch.ends

    whole, ends = run(tmp_path / "whole")
    resumed, later = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-4")
    assert ends == [3, 6] and later == [6]
    ours, theirs = whole.optimizer.optimizer, resumed.optimizer.optimizer
    assert type(ours) is ExtraAdam and ours.last_jump.jumped > 0
    assert_same_run(whole.model, ours, resumed.model, theirs)
