"""A plain loop of accelerate's with ExtraAdam, under FSDP2 or DeepSpeed ZeRO-2: the configuration says which.

accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/accelerate/train.py
accelerate launch --config_file examples/accelerate/zero2.yaml examples/accelerate/train.py
"""

from __future__ import annotations

import os

import torch
from accelerate import Accelerator, DistributedType, PartialState
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from extraopt import ExtraAdam


def use_cpus() -> None:
    """accelerate's FSDP and DeepSpeed's ZeRO are made for GPUs, but they run on CPUs once told to."""
    state = PartialState(cpu=True)  # the first to be made decides for all
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # gloo does without this C++ extension


if __name__ == "__main__":
    if not torch.cuda.is_available():
        use_cpus()
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = ExtraAdam(
        model.parameters(), lr=1e-3, extra_every=5, extra_steps=20, extra_kl=None
    )  # no logits to watch
    x = torch.linspace(-3, 3, 512)[:, None]
    data = DataLoader(TensorDataset(x, torch.sin(2 * x) * x), batch_size=256)
    model, optimizer, data = accelerator.prepare(model, optimizer, data)
    extra = optimizer.optimizer  # within accelerate's wrapper, and DeepSpeed's within that
    extra = extra if isinstance(extra, ExtraAdam) else extra.optimizer
    kind = type(extra.param_groups[0]["params"][0].data).__name__
    accelerator.print(f"{accelerator.distributed_type.value}, {accelerator.num_processes} processes, weights: {kind}")

    for step in range(1, 101):
        for inputs, targets in data:  # one batch for each process
            loss = nn.functional.mse_loss(model(inputs), targets)
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        jump = extra.last_jump
        if jump and jump.step == step:
            how = f"coherence {jump.coherence:.2f}, gate {jump.gate:.2f}, {jump.jumped} tensors jumped"
            accelerator.print(f"step {step:3}: loss {loss.item():.4f}, {how}", flush=True)
    accelerator.end_training()
