"""What a user gets: the wheel, its imports, its types, its house rules."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, cwd: Path, **env: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", **env},
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources and unpacked: what `pip install extraopt` leaves in site-packages."""
    out = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    for name in files.split("\n"):
        if name.startswith(("extraopt/", "kernels/")) or name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / name).is_file():
                (out / "src" / name).parent.mkdir(parents=True, exist_ok=True)
                (out / "src" / name).write_bytes((ROOT / name).read_bytes())
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(out), str(out / "src")]
    subprocess.run(build, check=True)
    with zipfile.ZipFile(next(out.glob("extraopt-*.whl"))) as wheel:
        wheel.extractall(out / "site")
    return out / "site"


def test_the_wheel_has_only_our_package_and_no_top_level_kernels(installed: Path):
    assert {p.name for p in installed.iterdir() if not p.name.endswith(".dist-info")} == {"extraopt"}
    names = {str(p.relative_to(installed / "extraopt")) for p in (installed / "extraopt").rglob("*") if p.is_file()}
    sources = {str(p.relative_to(ROOT / "extraopt")) for p in (ROOT / "extraopt").rglob("*.py")} | {"py.typed"}
    names -= {"kernels/native.c", "kernels/_native.abi3.so"}  # the source, and what a C compiler made of it
    assert names == sources | {f"kernels/{p.name}" for p in (ROOT / "kernels").glob("*.py")}


def test_the_wheel_imports_outside_the_checkout_and_pulls_in_nothing_heavy(installed: Path, tmp_path: Path):
    code = """
import sys, torch
before = set(sys.modules)
import extraopt, extraopt.kernels
new = {m.split(".")[0] for m in set(sys.modules) - before}
print(extraopt.__file__); print(extraopt.kernels.__file__); print(sorted(new)); print("kernels" in sys.modules)
"""
    ours, kernels, new, bare = python(code, tmp_path, PYTHONPATH=str(installed)).split("\n")
    assert ours.startswith(str(installed)) and kernels.startswith(str(installed / "extraopt" / "kernels"))
    heavy = {"triton", "transformers", "trl", "peft", "accelerate", "matplotlib", "typer", "rich", "numpy", "kernels"}
    assert not heavy & set(eval(new)) and bare == "False"


def test_version_is_printed(installed: Path, tmp_path: Path):
    command = [sys.executable, "-m", "extraopt", "--version"]
    env = {"PYTHONPATH": str(installed), "PATH": "/usr/bin:/bin"}
    out = subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True, text=True).stdout
    assert re.fullmatch(r"extraopt \d+\.\d+\.\d+ \(torch \S+, triton .+\)\n", out)


@pytest.mark.slow
def test_public_types_are_strict(installed: Path, tmp_path: Path):
    result = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path), "-p", "extraopt"],
        cwd=tmp_path, env={"MYPYPATH": str(installed), "PATH": "/usr/bin:/bin"}, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_sources_are_linted_and_formatted(command: list[str]):
    result = subprocess.run([sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_the_core_imports_neither_tools_nor_integrations():
    for path in [*(ROOT / "extraopt").glob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        text = path.read_text()
        assert not re.search(r"^\s*(from|import) (transformers|trl|peft|accelerate|lightning|deepspeed)", text, re.M), (
            path
        )
        assert path.name == "__main__.py" or not re.search(r"^\s*from \.(tools|integrations)", text, re.M), path


def test_the_readme_lists_other_places_than_are_tested():
    import support

    _, _, rest = support.PAGE.read_text().partition(support.BEGIN)
    rows = rest.partition(support.END)[0].strip().splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [where for where, *_ in support.ROWS]


def test_an_uninstalled_checkout_says_what_to_do(tmp_path: Path):
    shutil.copytree(ROOT / "extraopt", tmp_path / "extraopt", ignore=shutil.ignore_patterns("__pycache__"))
    hidden = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; import extraopt"
    result = subprocess.run([sys.executable, "-c", hidden], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1].startswith("ImportError: extraopt is not installed: run `pip install")
