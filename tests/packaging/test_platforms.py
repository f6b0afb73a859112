"""macOS and Windows: no Triton, no C loops, nothing that only POSIX has. What they compute is plain torch.

Neither runs here. So both accelerations are hidden from a fresh process; `make lint` has mypy read the code as it would
be on each platform.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from test_packaging import Environment, build_wheel, sources  # noqa: F401 (a fixture)

ROOT = Path(__file__).resolve().parents[2]
POSIX = {"crypt", "curses", "fcntl", "grp", "nis", "posix", "pty", "pwd", "readline", "resource", "spwd", "syslog",
         "termios", "tty"}  # fmt: skip

HIDE = """
import sys


class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "triton":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Hidden)
from pathlib import Path
from extraopt.kernels import native
native.FOLDER = Path("/nowhere")
"""

TRAIN = """
import hashlib
import torch
from extraopt import ExtraAdam
from extraopt.kernels import lists, native
from extraopt.wrap import Extra

torch.manual_seed(0)
torch.set_num_threads(1)


def digest(make):
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 200), torch.nn.Tanh(), torch.nn.Linear(200, 9))
    layers.to(torch.bfloat16)[2].float()
    optimizer = make(layers.parameters())
    optimizer.watch(layers, logits=lambda out: out)
    x = torch.randn(32, 64)
    jumps = []
    for _ in range(9):
        optimizer.zero_grad()
        hidden = layers[1](layers[0](x.bfloat16())).float()
        torch.nn.functional.cross_entropy(layers[2](hidden), x[:, :9].argmax(1)).backward()
        optimizer.step()
        jumps.append(optimizer.last_jump.jumped if optimizer.last_jump else 0)
    assert max(jumps) == 4, jumps
    return hashlib.sha256(b"".join(p.detach().float().numpy().tobytes() for p in layers.parameters())).hexdigest()


options = dict(extra_every=3, extra_gate=None, extra_kl=None, extra_steps=6)
print(digest(lambda params: ExtraAdam(params, lr=1e-3, **options)))
print(digest(lambda params: Extra(torch.optim.SGD(params, lr=1e-2), **options)))
fused = lists._fused()
print("triton" if fused else "no triton", "C" if native._library() else "no C")
"""

IMPORTS = """
import importlib, pkgutil
import extraopt, extraopt.kernels
for package in extraopt, extraopt.kernels:
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        name = module.name.rpartition(".")[2]
        if ".integrations." in module.name or name in ("__main__", "multi_tensor") or name.startswith("_native"):
            continue
        importlib.import_module(module.name)
print("all")
"""


def said(code: str, tmp_path: Path) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout.split("\n")[:-1]


def test_without_triton_and_c_all_modules_import_and_the_weights_are_the_same(tmp_path: Path) -> None:
    hidden, plain = said(HIDE + TRAIN + IMPORTS, tmp_path), said(TRAIN, tmp_path)
    assert hidden[2:] == ["no triton no C", "all"]
    assert hidden[:2] == plain[:2]


@pytest.mark.slow
def test_the_wheel_for_all_platforms_carries_no_machine_code(sources: Path, tmp_path: Path) -> None:  # noqa: F811
    wheel = build_wheel(sources, tmp_path, EXTRAOPT_PURE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert [name for name in archive.namelist() if name.endswith((".so", ".pyd", ".dylib"))] == []
    environment = Environment(tmp_path / "env")
    environment.install(wheel)
    code = "from extraopt.kernels import native; import extraopt; print(native._library(), extraopt.__file__)"
    assert environment.python("-c", code) == f"None {environment.site / 'extraopt' / '__init__.py'}"


def test_no_module_of_ours_imports_what_only_posix_has() -> None:
    found = set()
    for file in [*(ROOT / "extraopt").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            found |= {(file.name, name) for name in names if name.partition(".")[0] in POSIX}
    assert found == set()
