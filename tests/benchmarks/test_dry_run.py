"""The presets of benchmarks/grpo_llm.py for models of a hub take every step of a real run on tiny random weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "grpo_llm.py"


@pytest.mark.slow
@pytest.mark.parametrize(("preset", "tunings"), [("qwen", 2), ("qwen-1.5b", 2), ("paper", 1)])
def test_a_preset_runs_on_tiny_weights_without_a_hub(preset: str, tunings: int, tmp_path: Path) -> None:
    for package in "trl", "peft", "reasoning_gym", "typer":
        pytest.importorskip(package, reason=f"needs {package}: pip install 'extraopt[demo]'")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path / "data")}
    command = [sys.executable, str(SCRIPT), "--preset", preset, "--dry-run"]
    shown = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert shown.returncode == 0, shown.stderr[-3000:]
    lines = shown.stdout.strip().splitlines()
    for name, cycles in ("AdamW", 0), ("ExtraAdam", 2), ("RL-Extra (20,100)", 0):
        assert [line.endswith(f": 12 tiny steps, {cycles} cycles") for line in lines if f", {name}:" in line] == [
            True
        ] * tunings
    assert not list(tmp_path.glob("runs*"))  # it keeps nothing


@pytest.mark.slow
def test_the_bundled_model_needs_no_dry_run(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="needs trl: pip install 'extraopt[demo]'")
    command = [sys.executable, str(SCRIPT), "--dry-run"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    assert shown.returncode == 2 and "no dry run of SmolLM2" in shown.stderr
