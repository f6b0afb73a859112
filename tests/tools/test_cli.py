"""The `extraopt` command: help, versions, JSON for scripts, words for people."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from _checkpoint_models import run_of

from extraopt.tools import cli


def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    monkeypatch.setattr(sys, "argv", ["extraopt", *map(str, words)])
    monkeypatch.setenv("COLUMNS", "200")
    capsys.readouterr()  # what libraries printed while models were made
    with pytest.raises(SystemExit) as stop:
        cli.run()
    said = capsys.readouterr()
    assert stop.value.code == 0, said
    return said.out


def test_extrapolate_tells_what_it_did(capsys, monkeypatch, tmp_path: Path):
    a, b = run_of(tmp_path, "qwen2-tied")
    told = run(capsys, monkeypatch, "extrapolate", a, b, "--alpha", "1.5", "-o", tmp_path / "out")
    assert "-1.5 * checkpoint-100 +2.5 * checkpoint-200" in told
    assert "lm_head.weight" in told and str(tmp_path / "out") in told
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("steps", [("--steps", "300", "600"), ("--steps", "300,600")])
def test_steps_and_json(capsys, monkeypatch, tmp_path: Path, steps: tuple[str, ...]):
    a, b = run_of(tmp_path, "llama")
    words = ("extrapolate", a, b, *steps, "--to", "900", "--exclude", "*norm*", "--exclude", "lm_head*", "--json")
    told = json.loads(run(capsys, monkeypatch, *words, "-o", tmp_path / "out"))
    assert told["alpha"] == 1 and [weight for _, weight in told["sum"]] == [-1, 2]
    assert told["out"] == str(tmp_path / "out") and told["seconds"] > 0
    assert len(told["copied"]) == 6 and told["extrapolated"] == 15


def test_a_run_is_named_by_its_folder(capsys, monkeypatch, tmp_path: Path):
    run_of(tmp_path / "run", "llama", count=3)
    words = ("extrapolate", tmp_path / "run", "--fit", "ols", "--to", "600", "--json", "-o", tmp_path / "out")
    told = json.loads(run(capsys, monkeypatch, *words))
    assert [weight for _, weight in told["sum"]] == pytest.approx([-5 / 3, 1 / 3, 7 / 3])
    assert told["alpha"] == 1.5


# scores alpha against 2, from the folder's name
SCORE = "import re, sys; a = re.search('alpha-(.*)|$', sys.argv[1])[1] or 0; print('score:', -((float(a) - 2) ** 2))"


def test_sweep_names_and_draws_the_top(capsys, monkeypatch, tmp_path: Path):
    a, b = run_of(tmp_path, "llama")
    command = f'{sys.executable} -c "{SCORE}" {{dir}}'
    words = ("extrapolate", a, b, "--sweep", "1,2,4", "--eval", command)
    told = json.loads(run(capsys, monkeypatch, *words, "--json", "-o", tmp_path / "out"))
    assert [(row["alpha"], row["score"]) for row in told["rows"]] == [(0, -4), (1, -1), (2, 0), (4, -4)]
    assert told["best"]["dir"] == str(tmp_path / "out" / "alpha-2")
    assert (tmp_path / "out" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    told = run(capsys, monkeypatch, *words, "--plot", tmp_path / "u.svg", "-o", tmp_path / "again")
    assert "Best: alpha 2" in told and "<svg" in (tmp_path / "u.svg").read_text()


def test_checkpoints_left_out_are_told_on_stderr_and_links_count_once(capsys, monkeypatch, tmp_path: Path):
    folders = run_of(tmp_path / "run", "llama", count=3)
    folders[0].with_name("tmp-checkpoint-400").mkdir()
    folders[0].with_name("last").symlink_to(folders[2])
    monkeypatch.setattr(sys, "argv", ["extraopt", "linearity", str(tmp_path / "run"), "--sample", "10", "--json"])
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run()
    said = capsys.readouterr()
    assert stop.value.code == 0 and json.loads(said.out)["steps"] == [100, 200, 300]
    assert "tmp-checkpoint-400 was left out" in said.err


def test_lora_errors_are_told(capsys, monkeypatch, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'extraopt[hf]'")
    import torch
    from _checkpoint_models import make

    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        model.save_pretrained(folder)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn(parameter.shape)
    told = run(capsys, monkeypatch, "extrapolate", *folders, "--alpha", "2", "-o", tmp_path / "out")
    assert "cross term" in told and "cut back to its rank" in told
    words = ("extrapolate", *folders, "--alpha", "2", "--lora", "factors", "--json", "-o", tmp_path / "factors")
    told = json.loads(run(capsys, monkeypatch, *words))
    assert told["lora"]["written"] == "factors" and told["lora"]["cross_term"] > told["lora"]["truncation"] > 0


def test_help_needs_neither_transformers_nor_matplotlib():
    code = """
import sys
from extraopt.__main__ import main
sys.argv = ["extraopt", "--help"]
try:
    main()
except SystemExit as stop:
    assert stop.code == 0
assert not {"transformers", "matplotlib", "peft"} & set(sys.modules), "heavy imports"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(command in done.stdout for command in ("extrapolate", "linearity"))


def test_without_typer_it_says_what_to_install():
    code = """
import sys
sys.modules["typer"] = None
from extraopt.__main__ import main
sys.argv = ["extraopt", "extrapolate"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0 and "extraopt[cli]" in done.stderr and len(done.stderr.splitlines()) == 1
