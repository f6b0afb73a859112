"""States that released versions wrote are read by this one, and training goes on from them as it did then.

The files in `golden/` are never remade, only added: `golden/make.py VERSION` writes those of a new version. A test that
fails here says that a user's checkpoint would be lost.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_same
from torch import Tensor

from extraopt import ExtraAdam, __version__
from extraopt.wrap import Extra

FOLDER = Path(__file__).parent / "golden"
FILES = sorted(FOLDER.glob("*.pt"))
each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)


def load(file: Path) -> dict[str, Any]:
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    return saved


def resume(saved: dict[str, Any]) -> tuple[list[Tensor], torch.optim.Optimizer]:
    """An optimizer that knows nothing but which parameters are in which group."""
    params = [w.clone() for w in saved["weights"]]
    groups = [{"params": [params[i] for i in group["params"]]} for group in saved["state_dict"]["param_groups"]]
    kinds = {"ExtraAdam": ExtraAdam, "Extra-SGD": lambda groups: Extra(torch.optim.SGD(groups, momentum=0.5))}
    optimizer = kinds[saved["optimizer"]](groups)
    optimizer.load_state_dict(saved["state_dict"])
    return params, optimizer


@each_file
def test_a_checkpoint_of_an_older_version_continues_otherwise(file: Path) -> None:
    saved = load(file)
    params, optimizer = resume(saved)
    same_torch = saved["torch"] == torch.__version__
    ends = 0
    for step in range(len(saved["gradients"][0])):
        before = optimizer.last_jump
        for p, g in zip(params, saved["gradients"]):
            p.grad = g[step].clone()
        optimizer.step()
        ends += optimizer.last_jump is not before
        for i, (p, expected) in enumerate(zip(params, saved["expected"])):
            # another torch may sum in another order
            tolerance = {"rtol": 0, "atol": 0} if same_torch else {"rtol": 1e-5 if p.dtype.itemsize > 2 else 0.02}
            tolerance.setdefault("atol", 1e-6 if p.dtype.itemsize > 2 else 1e-3)
            torch.testing.assert_close(p, expected[step], **tolerance, msg=f"step {step + 1}, parameter {i}")
    assert ends >= 6  # four cycles of three, three cycles of four, some at once


@each_file
def test_a_checkpoint_of_an_older_version_loses_entries_or_knobs(file: Path) -> None:
    saved = load(file)
    _, optimizer = resume(saved)
    ours = optimizer.state_dict()
    assert_same(ours["state"], saved["state_dict"]["state"])
    for group, theirs in zip(ours["param_groups"], saved["state_dict"]["param_groups"]):
        assert_same({key: group[key] for key in theirs}, theirs)


def test_the_golden_files_hold_no_jump_or_no_retreat() -> None:
    """Else a resume that lost anchors and estimates would go unnoticed."""
    ours = [file for file in FILES if "ExtraAdam-gated-fp32" in file.name]
    assert ours and all(file.stat().st_size < 20_000 for file in FILES)
    for file in ours:
        saved = load(file)
        full, part = 0, 0
        params, optimizer = resume(saved)
        for step in range(len(saved["gradients"][0])):
            for p, g in zip(params, saved["gradients"]):
                p.grad = g[step].clone()
            optimizer.step()
            full += optimizer.last_jump is not None and optimizer.last_jump.jumped > 0
            part += optimizer.last_jump is not None and optimizer.last_jump.gate < 1
        assert full > 0 and part > 0, file.name


def test_a_version_is_released_without_golden_files() -> None:
    assert [file for file in FILES if file.name.startswith(f"{__version__}-")], f"python {FOLDER}/make.py {__version__}"


def test_golden_files_are_overwritten_or_filed_under_another_version() -> None:
    before = {file: file.stat().st_mtime_ns for file in FILES}
    for version in (__version__, "0.0.0"):
        command = [sys.executable, str(FOLDER / "make.py"), version]
        result = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert result.returncode == 1 and ("never remade" in result.stderr or "not 0.0.0" in result.stderr)
    assert {file: file.stat().st_mtime_ns for file in sorted(FOLDER.glob("*.pt"))} == before
