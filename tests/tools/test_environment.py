"""`python -m extraopt env`: what a bug report has to say of the machine."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import extraopt
from extraopt.kernels import foreach, lists, native
from extraopt.tools import environment

ROOT = Path(__file__).resolve().parents[2]


def test_env_has_all_versions_and_nobodys_name() -> None:
    said = dict(environment.environment())
    assert said["extraopt"] == extraopt.__version__ and said["Python"].startswith(platform.python_version())
    assert said["torch"].startswith(torch.__version__)
    for package in "transformers", "trl", "peft", "accelerate":
        try:
            assert said[package] == importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            assert said[package] == "not installed"
    assert ("GPUs" in said) == (torch.cuda.device_count() == 0)
    assert platform.node() not in said.values() and str(Path.home()) not in str(said)


@pytest.mark.parametrize("module", [native, foreach], ids=["C", "torch"])
def test_env_names_the_kernels_that_a_cycle_uses(module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "supports", lambda *tensors: module is native)
    used = lists.TensorLists([torch.zeros(3)], [torch.zeros(3)], None).work[0][0]
    assert used is module
    assert dict(environment.environment())["end of a cycle on CPUs"] == environment.KERNELS[module.__name__[17:]]


def test_a_broken_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory\nand a page of advice")

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    facts = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: fails() if i else facts)
    monkeypatch.setattr(torch, "zeros", lambda *size, device: fails() if device.type == "cuda" else torch.ones(1))
    said = dict(environment.environment())
    assert said["GPU 0"] == "A GPU, compute capability 9.0, 80 GiB"
    assert said["GPU 1"] == said["end of a cycle on GPU 0"] == "fails (CUDA error: out of memory)"


def test_env_does_without_the_libraries_of_the_command_line() -> None:
    code = """
import sys
sys.modules["typer"] = sys.modules["rich"] = None
from extraopt.__main__ import main
sys.argv = ["extraopt", "env"]
main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()][:4] == ["extraopt", "Python", "platform",
                                                                                  "torch"]  # fmt: skip


def test_the_form_of_bug_reports_asks_for_it() -> None:
    form = (ROOT / ".github" / "ISSUE_TEMPLATE" / "bug_report.yml").read_text(encoding="utf-8")
    assert "python -m extraopt env" in form
