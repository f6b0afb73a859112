"""Bad input ends in one line on stderr and exit code 2: nothing is written, run or touched."""

from __future__ import annotations

import errno
import importlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _checkpoint_models import SMALL, make, run_of, save, transformers
from safetensors.torch import load_file, save_file

from extraopt.tools import cli
from extraopt.tools.checkpoints import extrapolate

extrapolation = importlib.import_module("extraopt.tools.checkpoints.extrapolate")

WEIGHTS = "model.safetensors"
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """checkpoint-100 and checkpoint-200 as one file, in shards and as .bin."""
    tmp = tmp_path_factory.mktemp("source")
    for kind in ("safetensors", "sharded", "bin", "bin sharded"):
        run_of(tmp / kind, "llama", kind=kind)
    return tmp


@pytest.fixture
def pair(source: Path, tmp_path: Path) -> Callable[[str], tuple[Path, Path]]:
    def copy(kind: str = "safetensors") -> tuple[Path, Path]:
        shutil.copytree(source / kind, tmp_path / "run")
        return tmp_path / "run" / "checkpoint-100", tmp_path / "run" / "checkpoint-200"

    return copy


def snapshot(folder: Path) -> dict[str, tuple[bytes, int] | str]:
    """Everything below a folder: contents and times."""
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns) if path.is_file() else oct(path.lstat().st_mode)
        for path in folder.rglob("*")
    }


def refused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *words: str | Path) -> str:
    """Run the command line, check that it refuses as it should, and return what it said."""
    monkeypatch.setattr(sys, "argv", ["extraopt", "extrapolate", *map(str, words)])
    out = Path(words[words.index("-o") + 1])
    around = out.parent if out.parent.exists() else out.parent.parent
    before = snapshot(around)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.run()
    said = capsys.readouterr()
    assert stop.value.code == 2, said
    assert snapshot(around) == before  # inputs lie here too
    lines = said.err.splitlines()
    assert said.out == "" and len(lines) == 1 and lines[0].startswith("extraopt: "), said
    return lines[0]


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, {"format": "pt"})


def edit_json(file: Path, **values: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def set_to(value: object) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda state: state.__setitem__(NORM, value)


def corrupt(file: Path, start: int, content: bytes) -> None:
    data = bytearray(file.read_bytes())
    data[start : start + len(content)] = content
    file.write_bytes(data)


def claim(folder: Path, file: str) -> None:
    """Let the index say that a tensor is in another file."""
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**where, NORM: file})


def link_out(file: Path) -> None:
    file.rename(file.parents[2] / "elsewhere")
    file.symlink_to(file.parents[2] / "elsewhere")


DAMAGE: dict[str, tuple[str, Callable[[Path, Path], object], tuple[str, ...]]] = {
    "a key is missing": ("safetensors", lambda a, b: edit(b, lambda s: s.pop(NORM)), ("lacks", NORM, "checkpoint-200")),
    "a key too many": ("safetensors", lambda a, b: edit(b, set_to_extra), ("checkpoint-100 lacks new.weight",)),
    "another shape": ("safetensors", lambda a, b: edit(a, set_to(torch.ones(31))), (NORM, "(31,)", "(32,)")),
    "integers for floats": ("safetensors", lambda a, b: edit(a, set_to(torch.ones(32).int())), (NORM, "torch.int32")),
    "another family": (
        "safetensors", lambda a, b: edit_json(a / "config.json", model_type="mistral"), ("mixed families", "mistral"),
    ),
    "quantised": (
        "safetensors", lambda a, b: edit_json(b / "config.json", quantization_config={"bits": 4}), ("quantised",),
    ),
    "quantised, by a part's config": (
        "safetensors", lambda a, b: edit_json(b / "config.json", text_config={"quantization_config": {"bits": 4}}),
        ("quantised", "text_config.quantization_config"),
    ),
    "quantised, by compressed-tensors": (
        "safetensors", lambda a, b: edit_json(b / "config.json", compression_config={"format": "pack-quantized"}),
        ("quantised", "compression_config"),
    ),
    "quantised, by GPTQ's file": (
        "safetensors", lambda a, b: (b / "quantize_config.json").write_text('{"bits": 4}'),
        ("quantised", "quantize_config.json"),
    ),
    "quantised, by ModelOpt's file": (
        "safetensors", lambda a, b: (a / "hf_quant_config.json").write_text('{"producer": {"name": "modelopt"}}'),
        ("quantised", "hf_quant_config.json"),
    ),
    "quantised, by nothing but tensors": ("safetensors", lambda a, b: edit(b, quantise), ("quantised", "qweight")),
    "config is no JSON": ("safetensors", lambda a, b: (b / "config.json").write_text("{,"), ("config.json", "read")),
    "cut short": ("safetensors", lambda a, b: os.truncate(b / WEIGHTS, 9000), ("cut short", WEIGHTS, "checkpoint-200")),
    "empty file": ("safetensors", lambda a, b: os.truncate(b / WEIGHTS, 0), ("cut short", WEIGHTS)),
    "header is noise": ("safetensors", lambda a, b: corrupt(b / WEIGHTS, 8, b"\xff\0{{"), ("corrupt", WEIGHTS)),
    "header longer than the file": (
        "safetensors", lambda a, b: corrupt(b / WEIGHTS, 0, struct.pack("<Q", 2**60)), ("corrupt", WEIGHTS),
    ),
    "NaN in the first": (
        "safetensors", lambda a, b: edit(a, set_to(torch.tensor([1.0] * 31 + [float("nan")]))),
        (NORM, "NaN", "checkpoint-100"),
    ),
    "infinity in the last": (
        "safetensors", lambda a, b: edit(b, set_to(torch.arange(32.0).reciprocal())),
        (NORM, "infinity", "checkpoint-200"),
    ),
    "a shard is absent": (
        "sharded", lambda a, b: (b / "model-00002-of-00005.safetensors").unlink(),
        ("model-00002-of-00005", "not there"),
    ),
    "index is absent": (
        "sharded", lambda a, b: (b / "model.safetensors.index.json").unlink(), ("no index", "checkpoint-200"),
    ),
    "index is no JSON": (
        "sharded", lambda a, b: (b / "model.safetensors.index.json").write_text("["), ("index.json",),
    ),
    "index without a map": (
        "sharded", lambda a, b: (b / "model.safetensors.index.json").write_text("{}"), ("weight_map",),
    ),
    "index leads up": ("sharded", lambda a, b: claim(b, "../checkpoint-100/model.safetensors"), ("Refused", "../")),
    "index leads to a root": ("sharded", lambda a, b: claim(b, "/etc/passwd"), ("Refused", "/etc/passwd")),
    "index leads into a folder": ("sharded", lambda a, b: claim(b, "x/model.safetensors"), ("Refused",)),
    "index leads to dots": ("sharded", lambda a, b: claim(b, ".."), ("Refused",)),
    "index contradicts a shard": (
        "sharded", lambda a, b: claim(b, "model-00001-of-00005.safetensors"), (NORM, "does not say so"),
    ),
    "shard is a link out of the folder": (
        "sharded", lambda a, b: link_out(b / "model-00002-of-00005.safetensors"), ("link", "elsewhere", "Refused"),
    ),
    "config is a link out of the folder": ("safetensors", lambda a, b: link_out(b / "config.json"), ("link", "config")),
    "no weights": ("safetensors", lambda a, b: (b / WEIGHTS).unlink(), ("no weights", "checkpoint-200")),
    "verl's shards": (
        "safetensors", lambda a, b: (b / WEIGHTS).rename(b / "model_world_size_2_rank_0.pt"), ("verl.model_merger",),
    ),
    "bin cut short": (
        "bin", lambda a, b: os.truncate(b / "pytorch_model.bin", 9000), ("pytorch_model.bin", "cut short"),
    ),
    "bin shard is absent": (
        "bin sharded", lambda a, b: (b / "pytorch_model-00001-of-00002.bin").unlink(), ("not there",),
    ),
    "bin of something else": (
        "bin", lambda a, b: torch.save([torch.ones(2)], b / "pytorch_model.bin"), ("no plain dict",),
    ),
    "bin with a trainer's state": (
        "bin", lambda a, b: torch.save({"model": {"x": torch.ones(2)}}, b / "pytorch_model.bin"),
        ("no plain dict", "model"),
    ),
    "bin that is compressed": ("bin", lambda a, b: compress(b / "pytorch_model.bin"), ("compressed",)),
}  # fmt: skip


def quantise(state: dict[str, torch.Tensor]) -> None:
    layer = "model.layers.0.mlp.up_proj"
    weight = state.pop(f"{layer}.weight")
    state |= {f"{layer}.qweight": weight.to(torch.int32), f"{layer}.scales": torch.ones(4)}


def set_to_extra(state: dict[str, torch.Tensor]) -> None:
    state["new.weight"] = torch.ones(3)


def compress(file: Path) -> None:
    with zipfile.ZipFile(file) as old:
        records = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_checkpoints_are_refused(case: str, pair, capsys, monkeypatch, tmp_path: Path):
    kind, damage, said = DAMAGE[case]
    a, b = pair(kind)
    damage(a, b)
    line = refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", tmp_path / "out")
    assert all(word in line for word in said), line


OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "how far is not said": ((), "--alpha"),
    "how far is said twice": (("--alpha", "1", "--to", "300"), "--alpha"),
    "steps do not increase": (("--steps", "600", "300", "--to", "900"), "do not increase"),
    "steps for another number of checkpoints": (("--steps", "1", "2", "3", "--to", "900"), "3 steps for 2"),
    "steps are words": (("--steps", "a", "--to", "900"), "numbers"),
    "a pattern fits nothing": (("--alpha", "1", "--exclude", "*.mpl.*"), "fits no tensor"),
    "averages do not divide": (("--alpha", "1", "--average", "3"), "averaged"),
    "an average of all": (("--alpha", "1", "--average", "2"), "not a line"),
    "alpha is no number": (("--alpha", "nan"), "finite"),
    "out of the dtype's range": (("--alpha", "1e45"), "range"),
    "sweep and alpha": (("--alpha", "1", "--sweep", "1,2"), "--sweep"),
    "eval without sweep": (("--alpha", "1", "--eval", "cat {dir}"), "--sweep"),
    "eval without a folder": (("--sweep", "1,2", "--eval", "true"), "{dir}"),
    "eval without a score": (("--sweep", "1,2", "--eval", "true {dir}"), "gave no score"),
    "eval that fails": (("--sweep", "1,2", "--eval", "ls {dir}/absent"), "exit code"),
    "eval that is not there": (("--sweep", "1,2", "--eval", "no-such-command {dir}"), "no-such-command"),
    "picture of no kind": (("--sweep", "1,2", "--plot", "x.txt"), ".png"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_that_make_no_sense_are_refused(case: str, pair, capsys, monkeypatch, tmp_path: Path):
    a, b = pair()
    options, said = OPTIONS[case]
    assert said in refused(capsys, monkeypatch, a, b, *options, "-o", tmp_path / "out")


def test_one_checkpoint_or_several_runs_are_no_line(pair, capsys, monkeypatch, tmp_path: Path):
    a, b = pair()
    assert "two checkpoints" in refused(capsys, monkeypatch, a, "--alpha", "1", "-o", tmp_path / "out")
    assert "do not increase" in refused(capsys, monkeypatch, b, a, "--alpha", "1", "-o", tmp_path / "out")
    shutil.copytree(a, tmp_path / "run" / "other-3")
    assert "several runs" in refused(capsys, monkeypatch, a.parent, "--alpha", "1", "-o", tmp_path / "out")
    assert "no folder" in refused(capsys, monkeypatch, a, tmp_path / "absent", "--alpha", "1", "-o", tmp_path / "out")
    b.rename(b.with_name("final"))
    words = (a, b.with_name("final"), "--to", "900", "-o", tmp_path / "out")
    assert "--steps" in refused(capsys, monkeypatch, *words)


def test_an_output_that_is_taken_is_refused(pair, capsys, monkeypatch, tmp_path: Path):
    a, b = pair()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("full", "file"):
        for how in (("--alpha", "1"), ("--sweep", "1,2")):
            assert "not empty" in refused(capsys, monkeypatch, a, b, *how, "-o", tmp_path / name)
    assert "within the input" in refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", b / "out")
    link = tmp_path / "link"
    link.symlink_to(b)
    assert "within the input" in refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", link / "out")


def test_an_adapter_and_a_model_are_no_pair(pair, capsys, monkeypatch, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="needs peft: pip install 'extraopt[hf]'")
    _, b = pair()
    for name, options in {"x": {}, "y": {"r": 2}, "z": {"lora_alpha": 3}}.items():
        settings = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **options})
        peft.get_peft_model(make("llama"), settings).save_pretrained(tmp_path / name)
    out = tmp_path / "out"
    assert "adapter" in refused(capsys, monkeypatch, tmp_path / "x", b, "--alpha", "1", "-o", out)
    assert "have r 4 and 2" in refused(capsys, monkeypatch, tmp_path / "x", tmp_path / "y", "--alpha", "1", "-o", out)
    assert "lora_alpha" in refused(capsys, monkeypatch, tmp_path / "x", tmp_path / "z", "--alpha", "1", "-o", out)
    (tmp_path / "x" / "adapter_config.json").unlink()
    assert "adapter_config" in refused(capsys, monkeypatch, tmp_path / "x", tmp_path / "y", "--alpha", "1", "-o", out)


class Run:
    """What a malicious file would do."""

    def __reduce__(self):
        return Path.touch, (Path(os.environ["EXTRAOPT_TEST_CANARY"]),)


def test_a_pickle_that_runs_code_is_not_run(pair, capsys, monkeypatch, tmp_path: Path):
    canary = tmp_path / "canary"
    monkeypatch.setenv("EXTRAOPT_TEST_CANARY", str(canary))
    a, b = pair("bin")
    state = torch.load(b / "pytorch_model.bin", weights_only=True)
    torch.save({**state, "x": Run()}, b / "pytorch_model.bin")
    torch.load(b / "pytorch_model.bin", weights_only=False)
    assert canary.exists()  # the trap works
    canary.unlink()
    line = refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", tmp_path / "out")
    assert "run code" in line and "pytorch_model.bin" in line and not canary.exists()
    torch.save({**state, "x": Run()}, b / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    canary.unlink(missing_ok=True)
    refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", tmp_path / "out")
    assert not canary.exists()


REMOTE = """
import os
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM
Path(os.environ["EXTRAOPT_TEST_CANARY"]).touch()
class MyConfig(LlamaConfig):
    model_type = "mine"
class MyModel(LlamaForCausalLM):
    config_class = MyConfig
"""


def test_code_from_a_checkpoint_runs_only_when_trusted(pair, capsys, monkeypatch, tmp_path: Path):
    canary = tmp_path / "canary"
    monkeypatch.setenv("EXTRAOPT_TEST_CANARY", str(canary))
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    a, b = pair()
    for folder in (a, b):
        where = {"AutoConfig": "mine.MyConfig", "AutoModelForCausalLM": "mine.MyModel"}
        edit_json(folder / "config.json", model_type="mine", architectures=["MyModel"], auto_map=where)
        (folder / "mine.py").write_text(REMOTE)
    words = ["extraopt", "extrapolate", str(a), str(b), "--alpha", "1", "--json"]
    monkeypatch.setattr(sys, "argv", [*words, "-o", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert stop.value.code == 0 and not canary.exists()
    assert "could not be asked" in json.loads(capsys.readouterr().out)["notes"][0]
    assert (tmp_path / "out" / "mine.py").exists()  # copied, for it belongs to the model
    monkeypatch.setattr(sys, "argv", [*words, "--trust-remote-code", "-o", str(tmp_path / "trusted")])
    with pytest.raises(SystemExit) as stop:
        cli.run()
    assert stop.value.code == 0 and canary.exists()
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_the_hub_caches_own_links_are_followed(pair, tmp_path: Path):
    from extraopt.tools.checkpoints import extrapolate

    a, b = pair()
    cache = tmp_path / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "0123").mkdir(parents=True)
    for file in b.iterdir():
        shutil.copy(file, cache / "blobs" / f"hash-{file.name}")
        (cache / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/hash-{file.name}")
    extrapolate([a, cache / "snapshots" / "0123"], tmp_path / "out", alpha=1)
    extrapolate([a, b], tmp_path / "same", alpha=1)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in (tmp_path / "same").iterdir()}
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert (tmp_path / "out" / WEIGHTS).read_bytes() == (tmp_path / "same" / WEIGHTS).read_bytes()


def big_pair(tmp: Path) -> tuple[Path, Path]:
    """8 MB, so that there is a middle to stop in."""
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 32768}, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config)
    return save(model, tmp / "one"), save(model, tmp / "two")


CHILD = """
import contextlib, os, resource, signal, sys
from extraopt.tools import cli
from extraopt.tools.checkpoints import extrapolate
how, a, b, out = sys.argv[1:]
if how == "kill":
    def progress(done, total):
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGKILL)
    extrapolate([a, b], out, alpha=1, progress=progress)
elif how == "terminate":
    def progress(done, total):
        if done > total / 2:
            os.kill(os.getpid(), signal.SIGTERM)
    @contextlib.contextmanager
    def bar(what):
        yield progress
    cli.progress = bar
else:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 << 20, 4 << 20))
sys.argv = ["extraopt", "extrapolate", a, b, "--alpha", "1", "-o", out]
cli.run()
"""


def in_child(how: str, *paths: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", CHILD, how, *map(str, paths)], capture_output=True, text=True)


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path):
    a, b = big_pair(tmp_path)
    before = snapshot(tmp_path)
    done = in_child("limit", a, b, tmp_path / "out")
    assert done.returncode == 2 and done.stdout == "", done.stderr
    (line,) = done.stderr.splitlines()
    assert str(tmp_path / "out") in line and "File too large" in line
    assert snapshot(tmp_path) == before


def test_kill_9_in_the_middle_leaves_no_output(tmp_path: Path):
    a, b = big_pair(tmp_path)
    inputs = snapshot(a) | snapshot(b)
    done = in_child("kill", a, b, tmp_path / "out")
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    (rest,) = tmp_path.glob(".out.*")  # what no process can clear away; its name says what it is
    assert rest.name.endswith(".unfinished")
    assert snapshot(a) | snapshot(b) == inputs


def test_termination_in_the_middle_clears_up(tmp_path: Path):
    a, b = big_pair(tmp_path)
    before = snapshot(tmp_path)
    done = in_child("terminate", a, b, tmp_path / "out")
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert snapshot(tmp_path) == before


@pytest.fixture
def small_disk(tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mount.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_full_disk_is_said_before_and_in_the_middle(small_disk: Path, capsys, monkeypatch, tmp_path: Path):
    a, b = big_pair(tmp_path)
    line = refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", small_disk / "out")
    assert "disk is full" in line and str(small_disk / "out") in line
    plenty = shutil.disk_usage("/")._replace(free=2**40)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)  # space that another process then takes
    line = refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", small_disk / "out")
    assert "disk is full" in line


@pytest.mark.parametrize("bind", [False, True])
def test_a_mount_point_is_refused_before_the_work_and_a_folder_in_it_serves(
    bind: bool, small_disk: Path, pair, capsys, monkeypatch, tmp_path: Path
):
    a, b = pair()
    where = small_disk
    if bind:
        where = tmp_path / "bound"
        where.mkdir()
        (tmp_path / "source").mkdir()
        subprocess.run(["mount", "--bind", tmp_path / "source", where], check=True)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(extrapolation._Sum, "write", lambda *_: pytest.fail("the work began"))
            line = refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", where)
        assert "mount point" in line and str(where) in line
        extrapolate([a, b], where / "out", alpha=1)
        assert (where / "out" / WEIGHTS).exists()
    finally:
        if bind:
            subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EACCES, errno.ENOTSUP])
def test_a_disk_that_can_not_sync_and_tells_no_size_is_written_all_the_same(
    code: int, pair, monkeypatch, tmp_path: Path
):
    """As CIFS and FUSE do."""
    a, b = pair()

    def no(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    plain = os.open

    def open_no_folder(path, *args):
        return no() if os.path.isdir(path) and code == errno.EACCES else plain(path, *args)

    monkeypatch.setattr(os, "fsync", no)
    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(Path, "chmod", lambda *_: no() if code == errno.EACCES else None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 0))
    assert extrapolate([a, b], tmp_path / "out", alpha=1).bytes > 0


def test_a_disk_that_fails_in_a_sync_is_told(pair, capsys, monkeypatch, tmp_path: Path):
    a, b = pair()

    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", broken)
    line = refused(capsys, monkeypatch, a, b, "--alpha", "1", "-o", tmp_path / "out")
    assert os.strerror(errno.EIO) in line
