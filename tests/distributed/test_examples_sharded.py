"""The examples for sharded trainers, run as a user would: torchrun, accelerate launch, Lightning."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from extraopt import ExtraAdam

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LINE = re.compile(
    r"^step +(\d+): loss ([\d.]+), coherence (-?[\d.]+), gate ([\d.]+), (\d+) tensors jumped$", re.MULTILINE
)
Line = tuple[int, float, float, float, int]


def run(cwd: Path, *command: str) -> tuple[str, list[Line]]:
    """What a command prints, and the lines of it in which a cycle ended."""
    program = str(Path(sys.executable).with_name(command[0]))
    ours = ("RANK", "WORLD_SIZE", "MASTER_", "ACCELERATE_", "FSDP_", "DS_", "LOCAL_")  # what another test may have set
    env = {key: value for key, value in os.environ.items() if not key.startswith(ours)}
    done = subprocess.run(
        [program, *command[1:]],
        cwd=cwd,
        env={**env, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = LINE.findall(done.stdout)
    return done.stdout, [(int(step), float(a), float(b), float(c), int(n)) for step, a, b, c, n in found]


def port() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return str(free.getsockname()[1])


def torchrun(cwd: Path, script: str) -> tuple[str, list[Line]]:
    return run(cwd, "torchrun", "--nproc-per-node", "2", "--master-port", port(), str(EXAMPLES / script))


def launch(cwd: Path, config: str) -> tuple[str, list[Line]]:
    folder = EXAMPLES / "accelerate"
    options = ("--config_file", str(folder / config), "--main_process_port", port())
    return run(cwd, "accelerate", "launch", *options, str(folder / "train.py"))


@pytest.fixture(scope="module")
def one_process() -> list[Line]:
    """The run of the curve's examples in one process, without a break."""
    torch.manual_seed(0)
    nn = torch.nn
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    # its outputs are no logits: where they are found to be none, jumps are short, as without a look at them
    optimizer = ExtraAdam(model.parameters(), lr=1e-3, extra_every=5, extra_steps=20, extra_kl=None)
    x = torch.linspace(-3, 3, 512)[:, None]
    lines = []
    for step in range(1, 101):
        loss = nn.functional.mse_loss(model(x), torch.sin(2 * x) * x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        jump = optimizer.last_jump
        if jump is not None and jump.step == step:
            lines.append((step, loss.item(), jump.coherence, jump.gate, jump.jumped))
    return lines


def assert_like(lines: list[Line], expected: list[Line], loss: float) -> None:
    assert [line[0] for line in lines] == list(range(5, 101, 5))
    for line, one in zip(lines, expected, strict=True):
        assert line[1] == pytest.approx(one[1], rel=loss), line  # of another part of the data where there are ranks
        assert line[2] == pytest.approx(one[2], abs=0.05), line
        assert line[3] == pytest.approx(one[3], abs=0.05), line
    assert lines[0][4] == 0 and sum(line[4] == 6 for line in lines) >= 5
    assert lines[-1][1] < lines[0][1] / 3


def test_fsdp2_keeps_its_cycles_on_resuming(tmp_path: Path, one_process: list[Line]):
    _, lines = torchrun(tmp_path, "fsdp2.py")
    assert_like(lines, one_process, loss=0.2)
    after = {line[0]: line for line in lines}[50]
    assert after[4] > 0, "in the third step after the checkpoint some jump: its cycle and its estimate came along"


@pytest.mark.slow
def test_lightning_keeps_its_cycles_on_resuming(tmp_path: Path, one_process: list[Line]):
    if find_spec("lightning") is None:
        pytest.skip("lightning is not installed")
    out, lines = run(tmp_path, Path(sys.executable).name, str(EXAMPLES / "lightning_module.py"))
    assert_like(lines, one_process, loss=0.01)
    before, after = out.split("resuming from the checkpoint of step 48")
    assert len(LINE.findall(before)) == 9 and len(LINE.findall(after)) == 11


@pytest.mark.slow
def test_accelerate_fsdp2_shards_and_jumps_like_one_process(tmp_path: Path, one_process: list[Line]):
    pytest.importorskip("accelerate")
    out, lines = launch(tmp_path, "fsdp2.yaml")
    assert "FSDP, 2 processes, weights: DTensor" in out
    assert_like(lines, one_process, loss=0.2)


@pytest.mark.slow
def test_accelerate_zero2_jumps_under_deepspeed(tmp_path: Path):
    if find_spec("deepspeed") is None or find_spec("accelerate") is None:
        pytest.skip("deepspeed or accelerate is not installed")
    out, lines = launch(tmp_path, "zero2.yaml")
    assert "DEEPSPEED, 2 processes" in out
    assert [line[0] for line in lines] == list(range(5, 101, 5))
    assert lines[0][4] == 0 and sum(line[4] for line in lines) >= 5  # ZeRO makes one tensor of a rank's share
    assert {line[4] for line in lines} == {0, 1}
    assert lines[-1][1] < lines[0][1] / 3


def test_the_trainers_deepspeed_jumps(tmp_path: Path):
    if find_spec("deepspeed") is None or find_spec("transformers") is None:
        pytest.skip("deepspeed or transformers is not installed")
    _, lines = torchrun(tmp_path, "deepspeed_zero.py")
    assert [line[0] for line in lines] == list(range(5, 61, 5))
    assert lines[0][4] == 0 and sum(line[4] for line in lines) >= 3 and max(line[3] for line in lines) > 0.5
    assert lines[-1][1] < lines[0][1] / 2
