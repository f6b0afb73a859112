"""Checkpoints in the folders that trainers leave: which they are, of which steps, and which are left out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from extraopt.tools.checkpoints import CheckpointError, extrapolate, find_checkpoints


def put(folder: Path, adapter: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / ("adapter_config.json" if adapter else "config.json")).write_text(
        json.dumps({"peft_type": "LORA", "r": 2})
    )
    save_file({"x.weight": torch.ones(4)}, folder / f"{'adapter_' if adapter else ''}model.safetensors")
    return folder


def found(path: Path, notes: list[str] | None = None) -> list[tuple[int, str]]:
    return [(step, str(folder.relative_to(path))) for step, folder in find_checkpoints(path, notes)]


def test_a_link_and_what_it_leads_to_count_once(tmp_path: Path):
    for step in (30, 40):
        put(tmp_path / f"checkpoint-{step}")
    (tmp_path / "last").symlink_to("checkpoint-40")
    (tmp_path / "best").symlink_to("checkpoint-30")
    (tmp_path / "a-checkpoint-40").symlink_to(tmp_path / "checkpoint-40")
    assert found(tmp_path) == [(30, "checkpoint-30"), (40, "checkpoint-40")]
    assert find_checkpoints(tmp_path / "last") == [(40, tmp_path / "last")]
    report = extrapolate([tmp_path], tmp_path.parent / f"{tmp_path.name}-out", alpha=1)
    assert [weight for _, weight in report.sum] == [-1, 2]


LAYOUTS = {
    "TRL": (["checkpoint-{}", "."], "checkpoint-{}"),
    "TRL with adapters": (["checkpoint-{}/adapter"], "checkpoint-{}"),
    "verl": (["global_step_{}/actor/huggingface"], "global_step_{}/actor/huggingface"),
    "verl with adapters": (["global_step_{}/actor/lora_adapter/adapter"], "global_step_{}/actor/lora_adapter"),
    "OpenRLHF": (["global_step{}_hf"], "global_step{}_hf"),
    "ms-swift": (["checkpoint-{}"], "checkpoint-{}"),
    "ms-swift, the output folder": (["v0-20260101-123456/checkpoint-{}"], "v0-20260101-123456/checkpoint-{}"),
    "ms-swift, with merged copies": (["checkpoint-{}", "checkpoint-{}-merged"], "checkpoint-{}"),
    "Megatron": (["iter_000{}"], "iter_000{}"),
    "numbers": (["{}"], "{}"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_of_trainers_are_found(layout: str, tmp_path: Path):
    places, expected = LAYOUTS[layout]
    for place in places:
        for step in (20, 100) if "{}" in place else (0,):
            adapter = place.endswith("/adapter")
            folder = tmp_path / place.removesuffix("/adapter").format(step)
            if not folder.exists() or folder == tmp_path:
                put(folder / "new", adapter)
                for file in (folder / "new").iterdir():
                    file.rename(folder / file.name)
                (folder / "new").rmdir()
    if layout == "OpenRLHF":  # DeepSpeed's own states beside
        (tmp_path / "global_step20").mkdir()
        (tmp_path / "global_step20" / "mp_rank_00_model_states.pt").write_bytes(b"x")
    if layout.startswith("verl"):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    assert found(tmp_path) == [(step, expected.format(step)) for step in (20, 100)]


@pytest.mark.parametrize(
    "name", ["tmp-checkpoint-50", "checkpoint-50.tmp", ".checkpoint-50.x.unfinished", "checkpoint-50-incomplete"]
)
def test_unfinished_checkpoints_are_left_out_and_told(name: str, tmp_path: Path):
    for step in (30, 40):
        put(tmp_path / f"checkpoint-{step}")
    put(tmp_path / name)
    notes: list[str] = []
    assert [step for step, _ in found(tmp_path, notes)] == [30, 40]
    hidden = name.startswith(".")  # our own remains of a killed run, whose name is no checkpoint's
    assert hidden or (len(notes) == 1 and name in notes[0] and "not finished" in notes[0])
    report = extrapolate([tmp_path], tmp_path.parent / f"{tmp_path.name}-out", alpha=1)
    assert hidden or any(name in note for note in report.notes)


def test_what_verl_did_not_finish_is_left_out_and_told(tmp_path: Path):
    for step in (10, 20, 30):
        put(tmp_path / f"global_step_{step}" / "actor" / "huggingface")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("20\n")
    notes: list[str] = []
    assert [step for step, _ in found(tmp_path, notes)] == [10, 20]
    assert len(notes) == 1 and "global_step_30" in notes[0]


def test_several_runs_of_a_day_are_told(tmp_path: Path):
    for run in ("v0-20260101-1", "v1-20260101-2"):
        put(tmp_path / run / "checkpoint-10")
    with pytest.raises(CheckpointError, match="several runs.*v0-20260101-1"):
        find_checkpoints(tmp_path)


def test_a_number_within_a_word_is_no_step(tmp_path: Path):
    for name in ("Qwen3", "llama2", "v2"):
        assert find_checkpoints(put(tmp_path / name))[0][0] == 0
