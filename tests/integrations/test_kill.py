"""Runs that are killed with SIGKILL, resume by themselves and must end as if nothing had happened, bit for bit.

The runs are in `_lives.py`, with what was found out about checkpoints that were cut off; `_killed.py` kills them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import GATED, assert_same_run, tiny_model, train
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from extraopt import ExtraAdam

for library in "transformers", "accelerate", "safetensors":
    pytest.importorskip(library)

TESTS = Path(__file__).parent
KINDS = ["trainer", "dcp"]


def kill(folder: Path, seed: int, kills: int, timeout: float) -> dict[str, dict[str, Any]]:
    """The records of a campaign, by kind."""
    command = [
        sys.executable,
        str(TESTS / "_killed.py"),
        str(folder),
        str(seed),
        *(f"{kind}={kills}" for kind in KINDS),
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=folder)
    assert result.returncode == 0, result.stderr[-4000:]
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    return {line["kind"]: line for line in lines if "finished_runs" in line}


def check(record: dict[str, Any], kills: int) -> None:
    assert record["kills"] == kills and record["finished_runs"] > 0
    assert record["equal_runs"] == record["finished_runs"], record["differences"]
    assert record["jumps"] > 4 and record["retreats"] > 2, "a run without them loses nothing with its anchors"
    assert record["kills_in_save"] >= kills / 5 and record["kills_near_jump"] >= kills / 5
    assert record["incomplete_checkpoints"] > 0, "no kill left a checkpoint that was cut off"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return kill(tmp_path_factory.mktemp("killed"), seed=0, kills=10, timeout=300)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_killed_ends_in_other_weights(records: dict[str, dict[str, Any]], kind: str) -> None:
    check(records[kind], 10)


@pytest.mark.slow
def test_a_run_that_was_killed_ends_in_other_weights_200_times(tmp_path: Path) -> None:
    records = kill(tmp_path, seed=1, kills=100, timeout=1800)
    for kind in KINDS:
        check(records[kind], 100)


FILES = ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]


@pytest.mark.parametrize("how", ["missing", "empty", "cut short"])
@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_that_was_cut_off_is_resumed_from(tmp_path: Path, name: str, how: str) -> None:
    from _lives import newest_complete
    from safetensors.torch import save_file

    for step in 2, 4:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        save_file({"w": torch.ones(9)}, folder / FILES[0])
        for file in FILES[1:4]:
            torch.save({"w": torch.ones(9)}, folder / file)
        (folder / FILES[4]).write_text(json.dumps({"global_step": step}, indent=2) + "\n")
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-4")
    file = tmp_path / "checkpoint-4" / name
    if how == "missing":
        file.unlink()
    else:
        os.truncate(file, 0 if how == "empty" else file.stat().st_size // 2)
    assert newest_complete(tmp_path) == str(tmp_path / "checkpoint-2")
    assert not (tmp_path / "checkpoint-4").exists() and (tmp_path / "checkpoint-2").exists()


def test_the_length_or_the_noise_of_jumps_is_lost_with_torch_distributed_checkpoint(tmp_path: Path) -> None:
    """It reads only entries that a fresh optimizer has, and most of these are no tensors."""

    def fresh() -> tuple[torch.nn.Module, ExtraAdam]:
        model = tiny_model()
        return model, ExtraAdam(model.parameters(), lr=0.01, **GATED)

    model, optimizer = fresh()
    train(model, optimizer, range(8))
    optimizer.param_groups[0]["extra_length"] = 17.5  # as a search leaves it
    saved = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    dcp.save(saved, checkpoint_id=tmp_path / "checkpoint")

    other, resumed = fresh()
    loaded = dict(zip(("model", "optimizer"), get_state_dict(other, resumed)))
    dcp.load(loaded, checkpoint_id=tmp_path / "checkpoint")
    set_state_dict(other, resumed, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert_same_run(model, optimizer, other, resumed)
    assert any(state["extra_noise_var"] > 0 for state in resumed.state.values())
    assert resumed.param_groups[0]["extra_length"] == 17.5
