"""The training runs that `_killed.py` kills, as a user would write them: each finds by itself where to go on.

What was found out about checkpoints that were cut off, and what a user's loop has to do (transformers 5, torch 2.13):

- Trainer writes the weights first and `trainer_state.json` last, each in place, under no temporary name.
  `get_last_checkpoint`, and so `resume_from_checkpoint=True`, goes by the folder's name alone and takes the one that
  was cut off. To resume from that fails where `trainer_state.json` is missing (FileNotFoundError) or cut short
  (JSONDecodeError), or another file is cut short. But an `optimizer.pt`, `scheduler.pt` or `rng_state.pth` that is
  missing is *not* noticed as long as the rest is there: training goes on with new moments and a new cycle. So the rule
  is: the newest checkpoint whose `trainer_state.json` parses and whose other files are there and whole. Those that are
  not are deleted.
- A run that was killed between its last checkpoint and its end takes one step more when it resumes; with a learning
  rate that has fallen to 0 only the optimizer's state shows it. So a finished run is not resumed.
- torch.distributed.checkpoint writes `.metadata` last, under a temporary name, and renames it: a folder that has it is
  whole. One without it can't be read; it is deleted before its step is saved again.
- Neither waits for the disk by default (DCP: `sync_files`), so this is about processes that die, not power cuts.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import math
import mmap
import os
import shutil
import signal
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments, modeling_utils, set_seed
from transformers.trainer_callback import PrinterCallback, TrainerState
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import logging

from extraopt import ExtraAdam, mixin

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401  accelerate would import it in each life anew

EVERY, STEPS, SAVE_EVERY = 5, 30, 2  # saves fall on every place in a cycle
OPTIONS: dict[str, Any] = {"lr": 0.01, "betas": (0.5, 0.99), "extra_every": EVERY, "extra_steps": 10}
FINAL = "final.pt"

shared = mmap.mmap(-1, 6)  # what a life was doing when it was killed, and what it has seen
STEP, SAVING, JUMPING, INCOMPLETE, JUMPS, RETREATS = range(6)


@dataclass
class Plan:
    """When a life ends: after so many seconds, or when `rank` comes to the nth `point`."""

    delay: float = math.inf
    point: str = ""
    nth: int = 0
    rank: int = 0


def watch(plan: Plan, rank: int) -> Callable[[str], None]:
    """Let this process write its files in two halves, and say where it is, so that it can be killed right there.

    Returns what is to be called where a life comes to a point that it alone knows of.
    """

    def reached(point: str) -> None:
        if (point, rank) == (plan.point, plan.rank):
            plan.nth -= 1
            if plan.nth == 0:
                os.killpg(0, signal.SIGKILL)

    def in_halves(content: bytes, file: Any) -> None:
        stream = file if hasattr(file, "write") else open(file, "wb")
        stream.write(content[: len(content) // 2])
        stream.flush()
        reached("save")
        stream.write(content[len(content) // 2 :])
        stream.flush() if stream is file else stream.close()

    def save(content: Any, file: Any, *args: Any, **options: Any) -> None:
        whole = io.BytesIO()
        torch_save(content, whole, *args, **options)
        in_halves(whole.getvalue(), file)

    def save_file(tensors: Any, file: Any, metadata: Any = None) -> None:
        safe_save_file(tensors, file, metadata=metadata)
        in_halves(Path(file).read_bytes(), file)

    def save_to_json(state: TrainerState, file: str) -> None:
        to_json(state, file)
        in_halves(Path(file).read_bytes(), file)

    def rename(self: FileSystem, path: Any, new_path: Any) -> None:
        reached("save")
        move(self, path, new_path)
        reached("save")

    def end_cycle(*arguments: Any) -> Any:
        shared[JUMPING] = 1
        reached("jump")
        result = end(*arguments)
        reached("jump")
        shared[JUMPING] = 0
        if rank == 0:
            shared[JUMPS] += result[0].jumped
            shared[RETREATS] += result[0].gate < 1 and result[0].step > EVERY
        return result

    torch_save, safe_save_file, to_json = torch.save, modeling_utils.safe_save_file, TrainerState.save_to_json
    move, end = FileSystem.rename, mixin.end_cycle
    torch.save, modeling_utils.safe_save_file, TrainerState.save_to_json = save, save_file, save_to_json
    FileSystem.rename, mixin.end_cycle = rename, end_cycle
    Trainer._save_checkpoint = saving(Trainer._save_checkpoint)
    register_optimizer_step_post_hook(count)
    return reached


def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    shared[STEP] = int(next(iter(optimizer.state.values()))["step"])


def saving(save: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(save)
    def wrapped(*args: Any, **options: Any) -> None:
        shared[SAVING] = 1
        save(*args, **options)
        if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:  # it writes the marker, last
            shared[SAVING] = 0

    return wrapped


@saving
def publish(content: dict[str, Any], folder: Path) -> None:
    torch.save(content, folder / "final.tmp")
    os.replace(folder / "final.tmp", folder / FINAL)


def tokens() -> list[dict[str, torch.Tensor]]:
    rows = torch.randint(0, 32, (64, 8), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in rows]


def is_complete(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        with safe_open(checkpoint / "model.safetensors", "pt"):
            pass
    except (OSError, ValueError, SafetensorError):
        return False
    return all(zipfile.is_zipfile(checkpoint / name) for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))


def newest_complete(folder: Path) -> str | None:
    """The checkpoint to resume from; those that were cut off are deleted."""
    while (found := get_last_checkpoint(str(folder))) is not None and not is_complete(Path(found)):
        shared[INCOMPLETE] += 1
        shutil.rmtree(found)
    return found


def trainer_life(folder: Path, rank: int, plan: Plan) -> None:
    reached = watch(plan, rank)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    shape = {"vocab_size": 32, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=0, eos_token_id=0))  # with dropout: random states count
    args = TrainingArguments(
        str(folder), max_steps=STEPS, save_steps=SAVE_EVERY, save_total_limit=2, per_device_train_batch_size=8,
        report_to=[], logging_strategy="no", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    trainer = Trainer(model, args, train_dataset=tokens(), optimizer_cls_and_kwargs=(ExtraAdam, OPTIONS))
    trainer.remove_callback(PrinterCallback)
    newest, last = newest_complete(folder), folder / f"checkpoint-{STEPS}"
    if newest != str(last):
        trainer.train(resume_from_checkpoint=newest)
    reached("end")
    publish({"model": load_file(last / "model.safetensors"), "optimizer": torch.load(last / "optimizer.pt")}, folder)


def newest_folder(folder: Path) -> int:
    """The step of the newest checkpoint that DCP has finished; what it has not is deleted, as are old ones."""
    found = sorted((int(path.name.removeprefix("step-")), path) for path in folder.glob("step-*"))
    whole = [step for step, path in found if (path / ".metadata").exists()]
    for step, path in found:
        shared[INCOMPLETE] += step not in whole
        if step not in whole[-2:]:
            shutil.rmtree(path)
    return whole[-1] if whole else 0


def dcp_life(folder: Path, rank: int, plan: Plan) -> None:
    reached = watch(plan, rank)
    store = folder.parent / f"store-{os.getpgrp()}"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    torch.manual_seed(0)
    model = fully_shard(torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)))
    optimizer = ExtraAdam(model.parameters(), **OPTIONS)

    def state() -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))

    @saving
    def save(step: int) -> None:
        dcp.save(state(), checkpoint_id=folder / f"step-{step}")

    newest = [newest_folder(folder) if rank == 0 else 0]
    torch.distributed.broadcast_object_list(newest)
    if newest[0]:
        loaded = state()
        dcp.load(loaded, checkpoint_id=folder / f"step-{newest[0]}")
        set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    for step in range(newest[0] + 1, STEPS + 1):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :3].sin() - 2).square().mean().backward()
        optimizer.step()
        if step % SAVE_EVERY == 0:
            save(step)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, states = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        reached("end")
        publish({"model": weights, "optimizer": states}, folder)
    torch.distributed.barrier()  # no rank leaves, and ends the other's connection, before that


LIVES: dict[str, tuple[Callable[[Path, int, Plan], None], int]] = {"trainer": (trainer_life, 1), "dcp": (dcp_life, 2)}
