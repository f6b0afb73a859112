"""Hugging Face Trainer + DeepSpeed ZeRO-2: ExtraAdam by `optimizer_cls_and_kwargs`, its jumps in the Trainer's logs.

The DeepSpeed configuration has no "optimizer", which would be the one that steps: ExtraCallback fails where one does.

torchrun --nproc-per-node 2 examples/deepspeed_zero.py
"""

from __future__ import annotations

import os
import tempfile

import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does without this C++ extension

from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from extraopt import ExtraAdam
from extraopt.integrations.transformers import ExtraCallback

ZERO_2 = {
    "train_micro_batch_size_per_gpu": "auto",
    "zero_optimization": {"stage": 2},
    "zero_force_ds_cpu_optimizer": False,  # else an offloaded optimizer is replaced by DeepSpeed's
}


class Print(TrainerCallback):
    def on_log(self, args, state, control, logs, **kwargs):
        if state.is_world_process_zero and "loss" in logs:
            line = f"step {state.global_step:3}: loss {float(logs['loss']):.4f}"
            if "extra/gate" in logs:  # of this rank's share of all weights, which ZeRO makes one tensor
                line += ", coherence {extra/coherence:.2f}, gate {extra/gate:.2f}, {extra/jumped} tensors jumped"
            print(line.format(**logs), flush=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    half = torch.randint(3, 32, (256, 8))
    rows = [{"input_ids": row, "labels": row} for row in torch.cat([half, half], 1)]  # repeat what you have read
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=60, per_device_train_batch_size=32, lr_scheduler_type="constant", deepspeed=ZERO_2,
            logging_steps=5, report_to=[], disable_tqdm=True, save_strategy="no", use_cpu=not torch.cuda.is_available(),
        )  # fmt: skip
        ours = (ExtraAdam, {"lr": 3e-3, "extra_every": 5, "extra_steps": 25})
        model, watch = LlamaForCausalLM(config), [ExtraCallback(), Print()]
        trainer = Trainer(model, args, train_dataset=rows, optimizer_cls_and_kwargs=ours, callbacks=watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
