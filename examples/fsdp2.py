"""FSDP2: ExtraAdam on sharded tensors, stopped in the middle of a cycle and resumed by torch.distributed.checkpoint.

torchrun --nproc-per-node 2 examples/fsdp2.py
"""

from __future__ import annotations

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

from extraopt import ExtraAdam

DEVICE = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")


def build(seed: int) -> tuple[nn.Module, ExtraAdam]:
    torch.manual_seed(seed)  # the same weights on every rank, before they are cut
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).to(DEVICE)
    for module in (model[0], model[2], model[4], model):
        fully_shard(module)
    return model, ExtraAdam(
        model.parameters(), lr=1e-3, extra_every=5, extra_steps=20, extra_kl=None
    )  # no logits to watch


def train(model: nn.Module, optimizer: ExtraAdam, steps: range) -> None:
    x = torch.linspace(-3, 3, 512, device=DEVICE)[dist.get_rank() :: dist.get_world_size(), None]  # this rank's data
    for step in steps:
        loss = (model(x) - torch.sin(2 * x) * x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        jump = optimizer.last_jump
        line = f"step {step:3}: loss {loss.item():.4f}"
        if jump and jump.step == step:
            line += f", coherence {jump.coherence:.2f}, gate {jump.gate:.2f}, {jump.jumped} tensors jumped"
        if dist.get_rank() == 0 and step % 5 == 0:  # all ranks jump alike: a gate looks at a whole tensor
            print(line, flush=True)


if __name__ == "__main__":
    if DEVICE.type == "cuda":
        torch.cuda.set_device(DEVICE)
    dist.init_process_group()
    with tempfile.TemporaryDirectory() as own:
        dist.broadcast_object_list(folder := [own])  # all ranks write to that of the first
        saved, resumed = build(seed=0), build(seed=1)
        train(*saved, range(1, 48))
        dcp.save(dict(zip(("model", "optimizer"), get_state_dict(*saved))), checkpoint_id=folder[0])
        weights, state = get_state_dict(*resumed)
        dcp.load({"model": weights, "optimizer": state}, checkpoint_id=folder[0])
        set_state_dict(*resumed, model_state_dict=weights, optim_state_dict=state)
        train(*resumed, range(48, 101))
    dist.destroy_process_group()
