"""Public bug reports about sharded training: accelerate's FSDP2 on two gloo ranks, DeepSpeed's ZeRO on a CPU.

Each test is named after the symptom; its docstring names the reports.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import GATED, assert_same, batch_loss, tiny_model, train
from ranks import WORLD, Ranks

from extraopt import ExtraAdam


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(str(tmp_path / "store"))
    yield ranks
    ranks.close()


def local(tensors: Any) -> Any:
    return {k: v.to_local() if hasattr(v, "to_local") else v for k, v in tensors.items()}


def rank_accelerate(rank: int, folder: str) -> list[int]:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD), MASTER_ADDR="localhost")
    from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin, PartialState

    def prepare(seed: int, lr: float) -> tuple[Any, torch.nn.Module, Any]:
        accelerator = Accelerator(cpu=True)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type="SHARDED_STATE_DICT"
        )
        # accelerate offers FSDP on accelerators only; its FSDP2 code runs on a CPU all the same
        for state in (PartialState, type(accelerator.state)):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        assert accelerator.is_fsdp2
        model = tiny_model(seed)
        return accelerator, *accelerator.prepare(model, ExtraAdam(model.parameters(), lr=lr, **GATED))

    accelerator, model, optimizer = prepare(seed=0, lr=0.01)
    assert all(hasattr(p, "to_local") for p in model.parameters())
    train(model, optimizer.optimizer, range(5))
    accelerator.save_state(folder)
    ends = train(model, optimizer.optimizer, range(5, 12))

    accelerator, resumed, again = prepare(seed=1, lr=0.5)
    accelerator.load_state(folder)
    assert train(resumed, again.optimizer, range(5, 12)) == ends
    single = tiny_model()
    train(single, ExtraAdam(single.parameters(), lr=0.01, **GATED), range(12))
    assert_same(local(dict(resumed.named_parameters())), local(dict(model.named_parameters())))
    for p, q, s in zip(model.parameters(), resumed.parameters(), single.parameters()):
        assert_same(local(again.optimizer.state[q]), local(optimizer.optimizer.state[p]))
        assert_same(p.full_tensor().detach(), s.detach())
    assert optimizer.optimizer.last_jump.jumped == 4
    return ends


def test_a_sharded_checkpoint_misses_the_optimizer_state(ranks: Ranks, tmp_path: Path):
    """accelerate#3971: save_state and load_state under FSDP2."""
    pytest.importorskip("accelerate")
    assert ranks.run(rank_accelerate, str(tmp_path / "checkpoint")) == [[5, 8, 11]] * WORLD


EVERY = 4
DEEPSPEED_RULES: dict[str, dict[str, Any]] = {
    "paper": {"extra_every": EVERY, "extra_steps": 8, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None},
    "gated": {"extra_every": EVERY, "extra_steps": 8, "extra_kl": None},
}


def deepspeed_run(stage: int, rule: dict[str, Any], folder: str) -> dict[str, Any]:
    """Train six steps by a ZeRO stage, save, resume in a new engine, train both on; what was seen."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": 16,
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": stage, "sub_group_size": 20, "stage3_param_persistence_threshold": 0},
    }

    def build(seed: int) -> tuple[Any, ExtraAdam]:
        model = tiny_model(seed)
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters()}]
        optimizer = ExtraAdam(groups, lr=0.01, **rule)
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer

    def step(engine: Any, i: int) -> None:
        engine.backward(batch_loss(engine, i))
        engine.step()

    engine, optimizer = build(seed=0)
    seen: dict[str, Any] = {"states after init": len(optimizer.state), "calls": 0, "jumps": {}}
    last = None

    def log(*_: Any) -> None:
        nonlocal last
        seen["calls"] += 1
        if optimizer.last_jump is not last:
            last = optimizer.last_jump
            seen["jumps"].setdefault(str(i + 1), []).append([last.step, last.jumped])

    handle = optimizer.register_step_post_hook(log)
    for i in range(6):
        step(engine, i)
    handle.remove()
    seen["partitions"] = len(optimizer.state)
    seen["steps"] = sorted({int(s["step"]) for s in optimizer.state.values()})
    engine.save_checkpoint(folder, tag="six")
    resumed, again = build(seed=1)
    resumed.load_checkpoint(folder, tag="six")
    for i in range(6, 14):
        step(engine, i)
        step(resumed, i)
    for ours, theirs in zip(optimizer.state.values(), again.state.values(), strict=True):
        assert_same(ours, theirs)
    for p, q in zip(optimizer.state, again.state):
        assert_same(p.detach(), q.detach())
    return seen


def deepspeed_runs(folder: str) -> None:
    """All stages, into seen.json: called by `python -c`, since DeepSpeed sets up its process for good."""
    import deepspeed.ops

    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # a C++ extension that would be compiled now
    seen = {}
    for stage in (1, 2, 3):
        for name, rule in DEEPSPEED_RULES.items():
            try:
                seen[f"{stage} {name}"] = deepspeed_run(stage, rule, f"{folder}/{stage}-{name}")
            except Exception as error:
                seen[f"{stage} {name}"] = {"error": repr(error)}
    Path(folder, "seen.json").write_text(json.dumps(seen))


@pytest.fixture(scope="module")
def deepspeed_seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    if find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
    }
    code = f"import test_bugs_sharded; test_bugs_sharded.deepspeed_runs({str(folder)!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=folder, timeout=300, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "seen.json").read_text())


@pytest.mark.parametrize("rule", DEEPSPEED_RULES)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_shifts_or_multiplies_the_step_counter(deepspeed_seen, stage, rule):
    """DeepSpeed#5104, #1823: a step() at initialisation, one call for each group (ZeRO-1, 2) or sub-group (ZeRO-3)."""
    seen = deepspeed_seen[f"{stage} {rule}"]
    assert "error" not in seen, seen
    partitions = 3 if stage == 3 else 2
    assert seen["states after init"] == 0 and seen["partitions"] == partitions
    assert seen["calls"] == 6 * partitions and seen["steps"] == [6]
    assert seen["jumps"] == {str(EVERY): partitions * [[EVERY, int(rule == "paper")]]}
