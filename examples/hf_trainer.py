"""Hugging Face Trainer + a PEFT LoRA adapter: ExtraAdam by `optimizer_cls_and_kwargs`, nothing else changed.

A small Llama, made on the spot, learns to repeat what it has just read. Stops half-way and resumes from the checkpoint.

python examples/hf_trainer.py
"""

from __future__ import annotations

import tempfile

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from extraopt import ExtraAdam


class PrintJumps(TrainerCallback):
    def on_step_end(self, args, state, control, optimizer, **kwargs):
        jump = getattr(optimizer, "optimizer", optimizer).last_jump  # accelerate wraps the optimizer
        if jump and jump.step == state.global_step:
            how = f"coherence {jump.coherence:.2f}, gate {jump.gate:.2f}, {jump.jumped} tensors jumped"
            print(f"step {jump.step:3}: {how}")


def trainer(folder: str, steps: int) -> Trainer:
    set_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules="all-linear"))
    half = torch.randint(3, 32, (256, 8))
    tokens = torch.cat([half, half], 1)
    data = Dataset.from_dict({"input_ids": tokens.tolist(), "labels": tokens.tolist()})
    args = TrainingArguments(
        folder, max_steps=steps, save_steps=20, logging_steps=10, per_device_train_batch_size=32, report_to=[],
        lr_scheduler_type="constant", disable_tqdm=True, use_cpu=not torch.cuda.is_available(),
    )  # fmt: skip
    return Trainer(
        model,
        args,
        train_dataset=data,
        callbacks=[PrintJumps()],
        optimizer_cls_and_kwargs=(ExtraAdam, {"lr": 3e-3, "extra_every": 5, "extra_steps": 25}),
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        trainer(folder, steps=20).train()
        print("resuming from the checkpoint of step 20")
        trainer(folder, steps=40).train(resume_from_checkpoint=True)
