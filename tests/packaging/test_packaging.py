"""Our wheel, installed by pip in environments of its own: alone, beside another `kernels`, without a compiler."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def run(command: list[str], cwd: Path, **env: str) -> str:
    """Standard output of a command in an environment that knows of nothing here."""
    env = {"PATH": os.environ["PATH"], "HOME": str(cwd), **env}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.strip()


class Environment:
    """A virtual environment outside of the checkout, which is lent the dependencies (torch above all) of this one."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.executable = folder, str(folder / "bin" / "python")
        self.site = next((folder / "lib").glob("python*/site-packages"))
        self.lent = self.site / "lent.pth"  # comes after the environment's own packages

    def pip(self, *arguments: str) -> None:
        # what is lent must not look installed: pip would try to replace it
        self.lent.unlink(missing_ok=True)
        run([*PIP, "--python", self.executable, *arguments], self.folder)
        self.lent.write_text(sysconfig.get_path("purelib"))

    def install(self, *wheels: Path) -> None:
        self.pip("install", "--quiet", "--no-deps", "--no-index", *map(str, wheels))

    def python(self, *arguments: str) -> str:
        return run([self.executable, *arguments], self.folder)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has or would add."""
    if importlib.util.find_spec("setuptools") is None:
        pytest.skip("setuptools is not installed: pip install 'setuptools>=77'")
    out = tmp_path_factory.mktemp("sources") / "extraopt"
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in listed.splitlines():
        if not name.startswith("benchmarks/") and (ROOT / name).is_file():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_bytes((ROOT / name).read_bytes())
    return out


def build_wheel(source: Path, out: Path, **env: str) -> Path:
    copy = out / "copy"  # a build leaves behind what the next one would take
    shutil.copytree(source, copy)
    run([*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)], out, **env)
    (wheel,) = out.glob("extraopt-*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(sources, tmp_path_factory.mktemp("wheel"))


def stand_in(folder: Path) -> Path:
    """A wheel with the top-level name of Hugging Face's package, which has many files in it."""
    names = {"__init__.py": "WHOSE = 'theirs'\n", "layer/__init__.py": "LAYER = 1\n", "native.py": "NATIVE = 1\n"}
    info = "kernels-99.0.dist-info"
    files = {f"kernels/{name}": text for name, text in names.items()}
    files[f"{info}/METADATA"] = "Metadata-Version: 2.1\nName: kernels\nVersion: 99.0\n"
    files[f"{info}/WHEEL"] = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / "kernels-99.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@pytest.fixture(scope="module", params=["stand-in", pytest.param("Hugging Face's", marks=pytest.mark.slow)])
def their_kernels(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Wheels of the package named kernels."""
    folder = tmp_path_factory.mktemp("kernels")
    if request.param == "stand-in":
        return [stand_in(folder)]
    limits = ["--no-deps", "--only-binary", ":all:", "--retries", "0", "--timeout", "10", "-d", str(folder)]
    done = subprocess.run([*PIP, "download", "--quiet", *limits, "kernels"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip("pip gets no wheel of kernels: run this test where pip reaches a package index")
    return [*folder.glob("*.whl")]


def test_an_installed_wheel_needs_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "env")
    environment.install(wheel)
    code = """
import importlib.metadata, importlib.resources, importlib.util, torch, extraopt, extraopt.kernels
p = torch.nn.Parameter(torch.ones(8))
optimizer = extraopt.ExtraAdam([p], extra_every=1, extra_steps=3, extra_gate=None)
p.grad = torch.ones(8)
optimizer.step()
assert optimizer.last_jump.jumped == 1
print(extraopt.__file__); print(extraopt.kernels.__file__)
print(getattr(importlib.util.find_spec("kernels"), "origin", None))
print((importlib.resources.files("extraopt") / "py.typed").is_file())
print(importlib.metadata.version("extraopt") == extraopt.__version__)
"""
    ours, kernels, bare, typed, version = environment.python("-c", code).splitlines()
    assert ours == str(environment.site / "extraopt" / "__init__.py")
    assert kernels == str(environment.site / "extraopt" / "kernels" / "__init__.py")
    assert not bare.startswith(str(environment.folder)) and typed == version == "True"
    said = environment.python("-m", "extraopt", "--version")
    assert re.fullmatch(r"extraopt \d+\.\d+\.\d+ \(torch \S+, triton .+\)", said)
    assert run([str(environment.folder / "bin" / "extraopt"), "--version"], tmp_path) == said


@pytest.mark.parametrize("first", ["theirs first", "ours first"])
def test_the_package_named_kernels_is_shadowed_or_overwritten(
    first: str, wheel: Path, their_kernels: list[Path], tmp_path: Path
) -> None:
    """Installed before or after ours, imported before or after ours, and when either is gone again."""
    environment = Environment(tmp_path / "env")
    order = [their_kernels, [wheel]] if first == "theirs first" else [[wheel], their_kernels]
    for wheels in order:
        environment.install(*wheels)
    theirs, ours = environment.site / "kernels" / "__init__.py", environment.site / "extraopt" / "kernels"
    names = "kernels, extraopt.kernels" if first == "theirs first" else "extraopt.kernels, kernels"
    show = "print(kernels.__file__, extraopt.kernels.__file__, kernels is extraopt.kernels)"
    assert environment.python("-c", f"import {names}; {show}") == f"{theirs} {ours / '__init__.py'} False"

    owners = {
        d.name: {str(f) for f in d.files or ()} for d in importlib.metadata.distributions(path=[environment.site])
    }
    assert {"extraopt", "kernels"} <= owners.keys() and not owners["extraopt"] & owners["kernels"]
    with zipfile.ZipFile(next(path for path in their_kernels if path.name.startswith("kernels-"))) as archive:
        for name in archive.namelist():
            if name.startswith("kernels/"):
                assert (environment.site / name).read_bytes() == archive.read(name), name

    if first == "ours first":
        environment.pip("uninstall", "--quiet", "--yes", "extraopt")
        assert environment.python("-c", "import kernels; print(kernels.__file__)") == str(theirs)
        assert not (environment.site / "extraopt").exists()
    else:
        environment.pip("uninstall", "--quiet", "--yes", "kernels")
        assert (
            environment.python("-c", "from extraopt.kernels import TensorLists; print(TensorLists.__module__)")
            == "extraopt.kernels.lists"
        )
        assert not theirs.exists()


@pytest.mark.slow
def test_a_machine_without_a_compiler_gets_no_wheel(sources: Path, tmp_path: Path) -> None:
    """The C loops are optional: torch operations do the same."""
    environment = Environment(tmp_path / "env")
    environment.install(build_wheel(sources, tmp_path, CC="false"))
    assert not list((environment.site / "extraopt" / "kernels").glob("*.so"))
    code = """
import torch
from extraopt import ExtraAdam
from extraopt.kernels import native
p = torch.nn.Parameter(torch.ones(2000))
optimizer = ExtraAdam([p], extra_every=1, extra_steps=3, extra_gate=None, extra_beta=0.0, lr=0.5, weight_decay=0.0)
p.grad = torch.ones(2000)
optimizer.step()
print(native._library(), torch.allclose(p, torch.tensor(1 - 4 * 0.5)))
"""
    assert environment.python("-c", code) == "None True"


def test_the_source_archive_lacks_what_the_wheel_is_built_from(sources: Path, wheel: Path, tmp_path: Path) -> None:
    """kernels/ lies outside of the package, and the C file is no Python."""
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    shutil.copytree(sources, tmp_path / "copy")
    archive = tmp_path / run([sys.executable, "-c", code], tmp_path / "copy").splitlines()[-1]
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    (tmp_path / "again").mkdir()
    again = build_wheel(unpacked, tmp_path / "again")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as two:
        assert set(one.namelist()) == set(two.namelist())


def test_an_extra_asks_for_what_the_pinned_versions_do_not_meet(wheel: Path) -> None:
    """Each requirement of each extra, followed through those that name other extras, has a pin that it accepts."""
    packaging = pytest.importorskip("packaging.requirements", reason="packaging is not installed")
    from packaging.utils import canonicalize_name

    pins = [packaging.Requirement(line.partition("#")[0].strip()) for line in (ROOT / "constraints.txt").open()
            if line.partition("#")[0].strip()]  # fmt: skip
    pinned = {
        canonicalize_name(pin.name): next(iter(pin.specifier)).version
        for pin in pins
        if pin.marker is None or pin.marker.evaluate()
    }
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    extras = set(metadata.get_all("Provides-Extra"))
    requires = [packaging.Requirement(text) for text in metadata.get_all("Requires-Dist")]

    def needed(extra: str) -> list[packaging.Requirement]:
        found = []
        for requirement in requires:
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
                continue
            if requirement.name == "extraopt":
                assert requirement.extras <= extras, requirement
                found += [each for other in requirement.extras for each in needed(other)]
            else:
                found.append(requirement)
        return found

    (listed,) = re.findall(r"extras: ([\w, ]+)", (ROOT / "README.md").read_text())
    assert set(listed.split(", ")) <= extras
    for extra in extras | {""}:
        asked = needed(extra)
        assert {"torch", "triton"} <= {requirement.name for requirement in asked} or sys.platform != "linux"
        for requirement in asked:
            version = pinned.get(canonicalize_name(requirement.name))
            assert version is not None, f"extra {extra!r}: constraints.txt has no {requirement.name}"
            assert requirement.specifier.contains(version), f"extra {extra!r}: {requirement}, pinned {version}"
    assert len(needed("test")) > len(needed("demo")) > len(needed("hf")) > len(needed(""))


@pytest.mark.slow
def test_the_import_takes_longer_than_that_of_torch(wheel: Path, tmp_path: Path) -> None:
    """Processor time of `import extraopt` in fresh processes, of which `import torch` is a part: at most 5 % on top.

    Both are measured in one process, one after the other, so that a busy machine slows both.
    """
    environment = Environment(tmp_path / "env")
    environment.install(wheel)
    code = """
import time
begin = time.process_time()
import torch
middle = time.process_time()
import extraopt
print((time.process_time() - begin) / (middle - begin))
"""
    environment.python("-c", code)  # writes the byte code
    ratios = [float(environment.python("-c", code)) for _ in range(9)]
    assert statistics.median(ratios) < 1.05, sorted(ratios)
