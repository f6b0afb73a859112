"""Public bug reports from trainers: the real libraries on a model of a few hundred weights, made on the spot.

Each test is named after the symptom; its docstring names the reports.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GATED, PAPER, K, N, assert_same, assert_same_run, batch_loss, by_hand, tiny_model, train
from torch import Tensor

from extraopt import ExtraAdam

RATIO = N / K
OPEN = {**GATED, "extra_gate": None}  # jumps, however noisy so few steps are


@pytest.fixture
def accelerate() -> Iterator[types.ModuleType]:
    """The library, its process-wide singletons new."""
    accelerate = pytest.importorskip("accelerate")
    yield accelerate
    accelerate.state.AcceleratorState._reset_state(True)
    accelerate.state.GradientState._reset_state()


def llama(seed: int = 0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def tokens(step: int) -> Tensor:
    return (torch.arange(8).repeat(2, 1) * (step % 5 + 1) + step) % 13 + 3


ADAPTERS: dict[str, dict[str, Any]] = {
    "LoRA": {},
    "rsLoRA": {"use_rslora": True, "lora_alpha": 16},
    "DoRA": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
}


def adapted(kind: str = "LoRA") -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], **ADAPTERS[kind])
    return get_peft_model(llama(), config)


def trainable(model: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


class HfRun:
    """A finished run of transformers' Trainer, with the global steps that ended a cycle."""

    def __init__(self, model: Any, folder: Path, rule: dict[str, Any], resume: Path | None = None, **args: Any) -> None:
        from transformers import Trainer, TrainerCallback, TrainingArguments

        self.ends = ends = []

        class Log(TrainerCallback):
            last = None

            def on_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any, **_: Any) -> None:
                if optimizer.optimizer.last_jump is not self.last:
                    self.last = optimizer.optimizer.last_jump
                    ends.append(state.global_step + 1)

        options = {"max_steps": 12, "save_steps": 5, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
        quiet = {"report_to": [], "disable_tqdm": True, "logging_strategy": "no", "use_cpu": True}
        self.trainer = Trainer(
            model,
            TrainingArguments(str(folder), **{**options, **quiet, **args}),
            train_dataset=[{"input_ids": tokens(i)[0], "labels": tokens(i)[0]} for i in range(64)],
            optimizer_cls_and_kwargs=(ExtraAdam, {"lr": 1e-3, **rule}),
            callbacks=[Log()],
        )
        self.trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        self.optimizer = self.trainer.optimizer.optimizer


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_trainer_loses_the_anchor_on_resume(lora, tmp_path):
    """transformers resumes by torch.load(weights_only=True); with LoRA its second group is empty."""
    pytest.importorskip("peft" if lora else "transformers")
    make = adapted if lora else llama
    whole = HfRun(make(), tmp_path / "whole", GATED)
    resumed = HfRun(make(), tmp_path / "resumed", GATED, resume=tmp_path / "whole" / "checkpoint-5")
    assert type(whole.optimizer) is ExtraAdam and whole.optimizer.last_jump.jumped > 0
    assert whole.ends == [3, 6, 9, 12] and resumed.ends == [6, 9, 12]
    assert [len(g["params"]) == 0 for g in whole.optimizer.param_groups] == [False, lora]
    assert_same_run(whole.trainer.model, whole.optimizer, resumed.trainer.model, resumed.optimizer)


def test_trainer_counts_micro_batches(tmp_path):
    """SWivid/F5-TTS#631: an average was updated per micro-batch instead of per optimizer step."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    run = HfRun(llama(), tmp_path, PAPER, max_steps=7, gradient_accumulation_steps=4, save_strategy="no")
    assert run.ends == [3, 6]
    assert {int(s["step"]) for s in run.optimizer.state.values()} == {7}


def test_trainer_skips_the_jump_after_max_grad_norm(tmp_path):
    """A clipped run jumps too, and the callbacks of a step see its weights."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = llama()
    start = [p.detach().clone() for p in model.parameters()]
    HfRun(model, tmp_path, PAPER, max_steps=3, max_grad_norm=1e-3, save_strategy="no")
    far = llama()
    assert_same([p.detach() for p in far.parameters()], start)
    HfRun(far, tmp_path, {**PAPER, "extra_steps": 0}, max_steps=3, max_grad_norm=1e-3, save_strategy="no")
    for p, q, s in zip(model.parameters(), far.parameters(), start):
        torch.testing.assert_close(p - s, (1 + RATIO) * (q - s), rtol=1e-4, atol=1e-6)


def test_micro_batches_are_counted_under_accumulate(accelerate):
    """SWivid/F5-TTS#631, in accelerate."""
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = tiny_model()
    model, optimizer = accelerator.prepare(model, ExtraAdam(model.parameters(), lr=0.01, **PAPER))
    ends = []
    for i in range(4 * 7):
        before = optimizer.optimizer.last_jump
        with accelerator.accumulate(model):
            accelerator.backward(batch_loss(model, i))
            optimizer.step()
            optimizer.zero_grad()
        if optimizer.optimizer.last_jump is not before:
            ends.append(i)
    assert ends == [11, 23]


@pytest.mark.parametrize("fused", [False, True], ids=["unfused", "fused"])
def test_the_accelerated_optimizer_takes_an_overflow_for_a_step(accelerate, fused):
    """accelerate#4242: with a fused optimizer step_was_skipped stays False. The cycle must not care."""
    model = tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    accelerate.Accelerator(cpu=True)
    inner = ExtraAdam(model.parameters(), lr=0.01, fused=fused, **PAPER)
    optimizer = accelerate.optimizer.AcceleratedOptimizer(inner, scaler=scaler)
    ends = []
    for call in range(1, 9):
        before = inner.last_jump
        optimizer.zero_grad()
        scaler.scale(batch_loss(model, call)).backward()
        if call == 3:
            model[0].bias.grad[0] = float("inf")
        optimizer.step()
        if inner.last_jump is not before:
            ends.append((call, inner.last_jump.step))
    assert ends == [(4, 3), (7, 6)]


def test_the_optimizer_is_silently_replaced_on_offload(accelerate, monkeypatch):
    """accelerate#2169: with DeepSpeed offload accelerate trains by DeepSpeedCPUAdam, whatever it was given.

    `isinstance(..., ExtraAdam)` on the optimizer that is really used tells.
    """
    from accelerate.utils import deepspeed

    class DeepSpeedCPUAdam(torch.optim.Optimizer):
        def __init__(self, params: Any, adamw_mode: bool = False, **defaults: Any) -> None:
            super().__init__(params, {"adamw_mode": adamw_mode, **defaults})

    monkeypatch.setitem(sys.modules, "deepspeed.ops.adam", types.SimpleNamespace(DeepSpeedCPUAdam=DeepSpeedCPUAdam))
    monkeypatch.setitem(sys.modules, "deepspeed.ops", types.ModuleType("deepspeed.ops"))
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    monkeypatch.setattr(deepspeed, "compare_versions", lambda library, operation, version: version != "0.5.5")
    optimizer = ExtraAdam(tiny_model().parameters(), **GATED)
    assert isinstance(accelerate.Accelerator(cpu=True).prepare(optimizer).optimizer, ExtraAdam)
    replaced = deepspeed.map_pytorch_optim_to_deepspeed(optimizer)
    assert isinstance(replaced, DeepSpeedCPUAdam) and replaced.defaults["adamw_mode"] is True
    assert not isinstance(replaced, ExtraAdam)


def adapter_step(model: Any, optimizer: torch.optim.Optimizer, step: int) -> list[Tensor]:
    """One step; its gradients."""
    optimizer.zero_grad()
    model(input_ids=tokens(step), labels=tokens(step)).loss.backward()
    grads = [p.grad.clone() for p in trainable(model)]
    optimizer.step()
    return grads


@pytest.mark.parametrize("kind", ADAPTERS)
def test_weight_arithmetic_is_silently_wrong_for_this_adapter(kind):
    """peft#3761, PR #3449: rsLoRA and DoRA. The jump is plain arithmetic on whatever is trained."""
    pytest.importorskip("peft", reason="peft is not installed")
    model = adapted(kind)
    params = trainable(model)
    start = [p.detach().clone() for p in params]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    optimizer = ExtraAdam(params, lr=1e-3, **PAPER)
    grads = [adapter_step(model, optimizer, i) for i in range(2 * K)]
    assert optimizer.last_jump.jumped == len(params) and optimizer.last_jump.refused == 0
    for p, wanted in zip(params, by_hand(start, grads, lr=1e-3)):
        torch.testing.assert_close(p.detach(), wanted)
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), name
    with torch.no_grad():
        logits = model(input_ids=tokens(0)).logits
        model.merge_adapter()
        merged = model(input_ids=tokens(0)).logits
    assert logits.isfinite().all()
    torch.testing.assert_close(merged, logits, rtol=1e-4, atol=1e-5)


def test_jumping_both_factors_adds_cross_terms():
    """peft#3004, #1155: the product of two jumped factors is the jumped product plus F(F - 1) dB dA, F = 1 + N/k."""
    pytest.importorskip("peft", reason="peft is not installed")
    model = adapted()
    params = trainable(model)
    optimizer = ExtraAdam(params, lr=1e-2, **PAPER)
    for i in range(2 * K - 1):
        adapter_step(model, optimizer, i)
    layer = next(m for name, m in model.named_modules() if name.endswith("q_proj"))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    a0, b0 = (optimizer.state[p]["extra_anchor"].double() for p in (a, b))
    adapter_step(model, optimizer, 2 * K - 1)

    far = 1 + RATIO
    da, db = (a.detach().double() - a0) / far, (b.detach().double() - b0) / far
    scale = layer.scaling["default"]
    begin, end = scale * b0 @ a0, scale * (b0 + db) @ (a0 + da)
    wanted = end + RATIO * (end - begin) + far * (far - 1) * scale * db @ da
    got = layer.get_delta_weight("default").detach().double()
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-7)
    excess = (got - (end + RATIO * (end - begin))).norm() / (RATIO * (end - begin)).norm()
    assert 0.02 < excess < 0.5  # of the jump: not nothing, with steps as large as these


def test_lora_plus_makes_groups_that_break_the_optimizer():
    """peft's LoRA+ builds four groups, some of them empty, and passes our keywords on."""
    pytest.importorskip("peft", reason="peft is not installed")
    from peft.optimizers import create_loraplus_optimizer

    model = adapted()
    optimizer = create_loraplus_optimizer(
        model, optimizer_cls=ExtraAdam, lr=1e-3, loraplus_lr_ratio=16, loraplus_lr_embedding=1e-3, **OPEN
    )
    sizes = [len(g["params"]) for g in optimizer.param_groups]
    assert type(optimizer) is ExtraAdam and 0 in sizes and sum(sizes) == 4
    assert {g["extra_every"] for g in optimizer.param_groups} == {K}
    for i in range(2 * K):
        adapter_step(model, optimizer, i)
    assert optimizer.last_jump.step == 2 * K and optimizer.last_jump.jumped == 4
    assert {g["lr"] for g in optimizer.param_groups} == {1e-3, 16e-3}


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "LoRA"])
def test_grpo_trainer_takes_no_optimizer_class(lora, tmp_path):
    """TRL's GRPOTrainer has no such argument: set after construction, when the adapter's weights exist. Resumes too."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer

    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, **{str(i): i + 3 for i in range(13)}}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", padding_side="left"
    )

    def run(folder: Path, resume: Path | None = None) -> Any:
        trainer = GRPOTrainer(
            model=llama(),
            reward_funcs=lambda completion_ids, **_: [float(sum(c) % 7) for c in completion_ids],
            args=GRPOConfig(
                str(folder),
                max_steps=7,
                save_steps=4,
                per_device_train_batch_size=4,
                num_generations=4,
                max_completion_length=3,
                report_to=[],
                disable_tqdm=True,
                logging_strategy="no",
                use_cpu=True,
                bf16=False,
            ),
            train_dataset=Dataset.from_dict({"prompt": [f"{i % 10} {i % 7}" for i in range(40)]}),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"]) if lora else None,
        )
        trainer.optimizer_cls_and_kwargs = (ExtraAdam, {"lr": 1e-3, **OPEN})
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    whole = run(tmp_path / "whole")
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-4")
    ours, theirs = whole.optimizer.optimizer, resumed.optimizer.optimizer
    assert type(ours) is ExtraAdam and ours.last_jump.step == 6 and ours.last_jump.jumped > 0
    assert_same_run(whole.model, ours, resumed.model, theirs)


@pytest.fixture
def lightning_run(tmp_path: Path) -> Any:
    """Fit a module for some steps with Lightning's Trainer; the module logs the steps that ended a cycle."""
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")

    class Module(lightning.LightningModule):
        def __init__(self, skip: set[int]) -> None:
            super().__init__()
            self.model, self.skip, self.ends, self.last = tiny_model(), skip, [], None

        def configure_optimizers(self) -> ExtraAdam:
            return ExtraAdam(self.model.parameters(), lr=0.01, **GATED)

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            return None if index in self.skip else batch_loss(self.model, self.global_step)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            raw = self.optimizers(use_pl_optimizer=False)
            if raw.last_jump is not self.last:
                self.last = raw.last_jump
                self.ends.append(raw.last_jump.step)

    def run(steps: int, resume: Path | None = None, skip: frozenset[int] = frozenset(), **options: Any) -> Any:
        module = Module(set(skip))
        trainer = lightning.Trainer(
            accelerator="cpu",
            max_steps=steps,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **options,
        )
        data = torch.utils.data.DataLoader(range(100), batch_size=None)
        trainer.fit(module, data, ckpt_path=resume)
        return module, trainer

    return run


@pytest.mark.filterwarnings("ignore")
def test_lightning_resumes_with_another_trajectory(lightning_run, tmp_path):
    """Lightning#18828, #18254: forward and backward run inside of step(closure); resume is bit-equal."""
    _, stopped = lightning_run(5)
    stopped.save_checkpoint(tmp_path / "5.ckpt")
    whole, trainer = lightning_run(12)
    resumed, again = lightning_run(12, resume=tmp_path / "5.ckpt")
    assert whole.ends == [3, 6, 9, 12] and resumed.ends == [6, 9, 12]
    assert_same_run(whole.model, trainer.optimizers[0], resumed.model, again.optimizers[0])
    model = tiny_model()
    optimizer = ExtraAdam(model.parameters(), lr=0.01, **GATED)
    train(model, optimizer, range(12))
    assert_same_run(whole.model, trainer.optimizers[0], model, optimizer)


@pytest.mark.filterwarnings("ignore")
def test_lightning_counts_batches_that_were_accumulated_or_skipped(lightning_run):
    """Lightning#18828."""
    module, trainer = lightning_run(7, accumulate_grad_batches=2)
    assert module.ends == [3, 6]
    module, trainer = lightning_run(7, skip=frozenset({1, 2}))  # training_step returns None: no gradients, no step
    optimizer = trainer.optimizers[0]
    applied = int(optimizer.state[module.model[0].weight]["step"])
    assert module.ends == [n for n in (3, 6) if n <= applied] and applied < 7


@pytest.mark.filterwarnings("ignore")
def test_lightnings_wrapper_is_no_optimizer_of_ours(lightning_run):
    """Lightning hands out a wrapper that has our class, but none of our attributes."""
    module, trainer = lightning_run(5)
    wrapper, raw = module.optimizers(), trainer.optimizers[0]
    assert wrapper is not raw and isinstance(wrapper, ExtraAdam)
    assert wrapper.last_jump is raw.last_jump and raw.last_jump.step == 3
    early = wrapper.jump()
    assert early.step == 5 and raw.last_jump is early
    train(module.model, raw, range(5, 8))
    assert raw.last_jump.step == 8 and wrapper.last_jump is raw.last_jump
