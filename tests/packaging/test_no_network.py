"""Nothing of ours asks the network, and nothing of ours runs code that lies in a file."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _checkpoint_models import run_of

from extraopt.tools import cli

ROOT = Path(__file__).resolve().parents[2]

# Python runs this before anything else, in each process that is started below it
BLOCK = """
import os, socket


def refuse(name, allowed=lambda *args: False):
    inner = getattr(socket.socket, name, None) or getattr(socket, name)

    def refused(*args, **options):
        if allowed(*args):
            return inner(*args, **options)
        with open(os.environ["NETWORK_LOG"], "a") as log:
            print(name, args[-1:], file=log)
        raise OSError(f"{name}: there is no network here")

    return refused


def unix(sock, *args):
    return sock.family == socket.AF_UNIX


for name in "connect", "connect_ex", "sendto":
    setattr(socket.socket, name, refuse(name, unix))
for name in "getaddrinfo", "gethostbyname", "gethostbyname_ex", "create_connection":
    setattr(socket, name, refuse(name))
"""

IMPORT_ALL = """
import importlib.util, pkgutil
import extraopt, extraopt.kernels

names = [m.name for package in (extraopt, extraopt.kernels)
         for m in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if importlib.util.find_spec(name).origin.endswith(".py") and not name.endswith("__main__"):
        importlib.import_module(name)
print(*sorted(names))
"""

TRAIN = """
import torch
from extraopt import ExtraAdam
from helpers import tiny_model, train

model = tiny_model()
print(train(model, ExtraAdam(model.parameters(), extra_every=3, extra_steps=6), range(9)))
"""


@pytest.fixture
def offline(tmp_path: Path) -> Callable[..., tuple[subprocess.CompletedProcess[str], str]]:
    """Run Python without a network; what it said, and what it tried."""
    (tmp_path / "block").mkdir()
    (tmp_path / "block" / "sitecustomize.py").write_text(BLOCK)
    log = tmp_path / "attempts"

    def run(*arguments: str | Path) -> tuple[subprocess.CompletedProcess[str], str]:
        env = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}  # offline or not, no calls
        env |= {
            "PYTHONPATH": os.pathsep.join((str(tmp_path / "block"), str(ROOT / "tests" / "common"))),
            "NETWORK_LOG": str(log),
        }
        env |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub"), "COLUMNS": "200"}
        command = [sys.executable, *map(str, arguments)]
        result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        return result, log.read_text() if log.exists() else ""

    return run


def test_the_block_lets_calls_through(offline) -> None:
    for call in (
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9/')",
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 80)",
    ):
        result, attempts = offline("-c", call)
        assert result.returncode != 0 and "there is no network here" in result.stderr
    assert [line.split()[0] for line in attempts.splitlines()] == ["create_connection", "connect", "getaddrinfo"]
    result, after = offline("-c", "import socket; a, b = socket.socketpair(); a.send(b'x'); print(b.recv(1))")
    assert result.stdout == "b'x'\n" and after == attempts


@pytest.mark.parametrize("code", [IMPORT_ALL, TRAIN], ids=["import", "train"])
def test_importing_or_training_asks_the_network(offline, code: str) -> None:
    result, attempts = offline("-c", code)
    assert result.returncode == 0, result.stderr
    assert attempts == ""
    if code is TRAIN:
        assert result.stdout == "[2, 5, 8]\n"
    else:
        found = set(result.stdout.split())
        tools = {f"tools.{name}" for name in ("cli", "plots", "decoding", "checkpoints.linearity")}
        wanted = {"adam", "wrap", "integrations.transformers"} | tools
        assert {f"extraopt.{name}" for name in wanted} <= found and "extraopt.kernels.foreach" in found


@pytest.mark.slow
def test_the_command_line_asks_the_network_about_local_checkpoints(offline, tmp_path: Path) -> None:
    folders = run_of(tmp_path / "run", "llama", count=3)
    out = tmp_path / "out"
    for words, said in (
        (["--help"], "linearity"),
        (["linearity", *folders, "--json"], "steps"),
        (["extrapolate", *folders[1:], "--alpha", "1", "-o", out], str(out.name)),
    ):
        result, attempts = offline("-m", "extraopt", *words)
        assert result.returncode == 0, result.stderr
        assert said in result.stdout + result.stderr and attempts == ""
    assert (out / "model.safetensors").is_file()


# --- files that would run code ---


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return open, (str(self.mark), "w")


def plant(file: Path, mark: Path, how: str) -> None:
    content = {"model.norm.weight": torch.ones(32), "payload": Bomb(mark)}
    if how == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=how == "zip")


def extraopt(monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> int:
    """The exit code of the command line."""
    monkeypatch.setattr(sys, "argv", ["extraopt", *map(str, words)])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    return int(stop.value.code or 0)


HOW = ["zip", "legacy", "pickle"]


@pytest.mark.parametrize("how", HOW)
def test_the_bomb_is_a_dud(tmp_path: Path, how: str) -> None:
    plant(tmp_path / "file", tmp_path / "mark", how)
    with contextlib.suppress(RuntimeError):  # no file of torch's, it finds out after reading it
        torch.load(tmp_path / "file", weights_only=False)
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin"])
def test_code_in_a_files_weights_is_run(tmp_path: Path, monkeypatch, capsys, name: str, how: str) -> None:
    mark = tmp_path / "mark"
    folders = run_of(tmp_path / "run", "llama", count=3)
    for folder in folders:
        if name.startswith("adapter"):
            (folder / "config.json").unlink()
            adapter = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "base_model_name_or_path": str(tmp_path)}
            (folder / "adapter_config.json").write_text(json.dumps(adapter))
        (folder / "model.safetensors").unlink()
        plant(folder / name, mark, how)
    capsys.readouterr()  # progress of the saves above
    assert extraopt(monkeypatch, "linearity", *folders) == 2
    assert extraopt(monkeypatch, "extrapolate", *folders[1:], "--alpha", "1", "-o", tmp_path / "out") == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and all(name in line for line in said)
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("how", HOW)
def test_code_in_a_trainers_other_files_is_run(tmp_path: Path, monkeypatch, capsys, how: str) -> None:
    mark = tmp_path / "mark"
    folders = run_of(tmp_path / "run", "llama", count=3)
    for folder in folders:
        for name in "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin":
            plant(folder / name, mark, how)
    assert extraopt(monkeypatch, "linearity", *folders) == 0
    assert extraopt(monkeypatch, "linearity", tmp_path / "run") == 0
    assert extraopt(monkeypatch, "extrapolate", *folders[1:], "--alpha", "1", "-o", tmp_path / "out") == 0
    assert not mark.exists(), capsys.readouterr()


def test_code_in_an_earlier_models_weights_is_run_by_generate(tmp_path: Path, monkeypatch, capsys) -> None:
    later, earlier = run_of(tmp_path / "run", "llama")
    (earlier / "model.safetensors").unlink()
    plant(earlier / "pytorch_model.bin", tmp_path / "mark", "zip")
    code = extraopt(monkeypatch, "generate", later, "--earlier", earlier, "--alpha", "0.5", "--prompt", "x")
    assert code == 2 and not (tmp_path / "mark").exists(), capsys.readouterr()


def test_code_in_an_optimizers_file_is_run_on_resume(tmp_path: Path) -> None:
    """As the README's readers load it; a state of ours holds nothing that this refuses."""
    plant(tmp_path / "optimizer.pt", tmp_path / "mark", "zip")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert not (tmp_path / "mark").exists()


def test_our_sources_and_documents_load_files_with_code_in_them() -> None:
    assert shutil.which("git"), "lists the files"
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    files = [
        ROOT / name
        for name in listed.stdout.split()
        if re.match(r"(extraopt|kernels|examples|benchmarks)/|\w+\.md", name)
    ]
    calls = [
        (file.name, call)
        for file in files
        if file.suffix in (".py", ".md") and file.is_file()
        for call in re.findall(r"(?:torch|pickle|joblib)\.loads?\([^\n]*", file.read_text())
    ]
    assert calls
    assert [call for call in calls if not call[1].startswith("torch") or "weights_only=True" not in call[1]] == []
