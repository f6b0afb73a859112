"""What no input may do: feed bytes to everything that reads what others wrote, by coverage, with atheris.

    pip install atheris
    python benchmarks/fuzz.py --seconds 60 [--target NAME] [--json benchmarks/results/fuzz.json] [--keep FOLDER]

A target may end in the errors that are documented for it, and in no others; it may take neither long nor much memory;
and a state that is refused leaves an optimizer as it was. `tests/tools/test_fuzz_corpus.py` replays tests/tools/corpus,
without atheris. Inputs that do what none may do are written to the folder of --keep: mend the cause, then put them
there.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FUZZING = "--worker" in sys.argv
if FUZZING:
    import atheris

    with atheris.instrument_imports(include=["extraopt"]):
        from extraopt import ExtraAdam
        from extraopt.tools import checkpoints, cli
        from extraopt.tools.checkpoints import models, read, tokens
        from extraopt.tools.generation import read_prompts
        from extraopt.tools.page import html
        from extraopt.tools.report import read_run, summarize
        from extraopt.wrap import Extra
else:
    from extraopt import ExtraAdam
    from extraopt.tools import checkpoints, cli
    from extraopt.tools.checkpoints import models, read, tokens
    from extraopt.tools.generation import read_prompts
    from extraopt.tools.page import html
    from extraopt.tools.report import read_run, summarize
    from extraopt.wrap import Extra

CORPUS = Path(__file__).resolve().parents[1] / "tests" / "tools" / "corpus"
LONG = 5.0  # seconds of this process
CheckpointError = checkpoints.CheckpointError


class Finding(AssertionError):
    """What an input did that none may do."""


class Draw:
    """Choices by the bytes of an input, the first of every list once they have run out."""

    def __init__(self, data: bytes):
        self.bytes = iter(data)

    def below(self, n: int) -> int:
        """A number from 0 to n - 1."""
        high = next(self.bytes, 0) << 8 if n > 256 else 0
        return (high + next(self.bytes, 0)) % n

    def one_of(self, options: Any) -> Any:
        """One of them; a call of it, if it is a function."""
        found = options[self.below(len(options))]
        return found() if callable(found) else found


def _deep() -> Any:
    nested: list[Any] = []
    for _ in range(3000):
        nested = [nested]
    return nested


NUMBERS = [0, 1, -1, 2, 3, 5, 2**24, 2**31, 2**53, 2**63, -(2**63), 10**17, 10**400, True, 0.5, -0.5, 1.0, 1e-320, 1e38,
           1e300, math.nan, math.inf, -math.inf, 1 - 1e-16]  # fmt: skip
HOSTILE = [
    *NUMBERS, None, "", "10", "abc", b"x", 1j, [], [0], [0, 0], {}, {"a": {}}, (), (1, 2), (0.9, 0.99), (1.0, 1.0),
    (0.9, 0.99, 0.9), set, lambda: range(3), lambda: [1.0] * 6, lambda: (math.nan,) * 6, lambda: (9.0, 1.0, -1.0) * 2,
    _deep, lambda: torch.tensor(4.0), lambda: torch.tensor(math.nan), lambda: torch.tensor(-1.0),
    lambda: torch.tensor(1e30), lambda: torch.tensor([2.0]), lambda: torch.tensor(5), lambda: torch.tensor(True),
    lambda: torch.tensor(255, dtype=torch.uint8), lambda: torch.ones(3), lambda: torch.ones(2, 2),
    lambda: torch.ones(0), lambda: torch.ones(3, 1), lambda: torch.ones(3, dtype=torch.int64),
    lambda: torch.ones(3, dtype=torch.complex64),
    lambda: torch.ones(3, dtype=torch.float64) * 1e300, lambda: torch.full((3,), math.nan),
    lambda: torch.full((2, 2), math.inf), lambda: -torch.ones(3), lambda: -torch.ones(2, 2),
    lambda: torch.ones(3).to_sparse(), lambda: torch.ones(3, device="meta"), lambda: torch.ones(3, requires_grad=True),
    lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8),
]  # fmt: skip
KEYS = [
    "state", "param_groups", "params", "step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer",
    "extra_anchor", "extra_estimate", "extra_origin", "extra_step", "extra_ratio", "extra_length", "extra_noise_cov",
    "extra_every", "extra_steps", "extra_beta", "extra_gate", "extra_start", "lr", "betas", "momentum", "beta1", "eps",
    "weight_decay", "amsgrad", "maximize", "foreach", "capturable", "differentiable", "fused", "train_mode",
    "param_names", "decoupled_weight_decay", 0, 1, 2, -1, None, 1.5,
]  # fmt: skip


def damage(draw: Draw, tree: Any) -> None:
    """Replace, take out or put in something, one to three times, anywhere in nested dicts and lists."""
    for _ in range(1 + draw.below(3)):
        node = tree
        while node:
            key = draw.one_of([*node] if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or draw.below(8) == 7:
                break
            node = node[key]
        how = draw.below(4) if node else 2
        if how < 2:
            node[key] = draw.one_of(HOSTILE)
        elif how == 2 and isinstance(node, dict):
            node[draw.one_of(KEYS)] = draw.one_of(HOSTILE)
        elif how == 2:
            node.append(draw.one_of(HOSTILE))
        else:
            del node[key]


# --- the state of an optimizer ---


def _adam(weights: list[Tensor], kind: int) -> ExtraAdam:
    rules: dict[str, Any] = {"extra_every": 3, "extra_steps": 6}
    rules |= {"extra_beta": 0.0, "extra_gate": None} if kind & 1 else {}
    groups = [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.01}] if kind & 2 else weights
    return ExtraAdam(groups, lr=0.01, amsgrad=bool(kind & 4), foreach=True if kind & 8 else None, **rules)


def _alone(weights: list[Tensor], kind: int) -> torch.optim.Optimizer:
    return torch.optim.AdamW(_adam(weights, kind).param_groups)


BASES: list[Callable[[list[Tensor]], torch.optim.Optimizer]] = [
    lambda weights: torch.optim.SGD(weights, lr=0.01, momentum=0.9),
    torch.optim.AdamW,
    lambda weights: torch.optim.SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.01),
    torch.optim.NAdam,
    torch.optim.Adagrad,
]


def _base(weights: list[Tensor], kind: int) -> torch.optim.Optimizer:
    return BASES[kind % len(BASES)](weights)


def _extra(weights: list[Tensor], kind: int) -> Extra:
    return Extra(_base(weights, kind), extra_every=3, extra_steps=6)


def _weights(kind: int, other: bool = False) -> list[Tensor]:
    dtype = torch.complex64 if kind & 16 else torch.bfloat16 if kind & 32 else torch.float32
    return [torch.nn.Parameter(torch.linspace(-1 - other, 1, n).reshape(s).to(dtype)) for n, s in ((3, 3), (4, (2, 2)))]


def _step(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()


@cache
def _trained(make: Callable[[list[Tensor], int], Any], kind: int, steps: int) -> dict[str, Any]:
    optimizer = make(_weights(kind), kind)
    for _ in range(steps):
        _step(optimizer)
    return copy.deepcopy(optimizer.state_dict())


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b)


def _finite(optimizer: torch.optim.Optimizer) -> bool:
    return all(bool(p.isfinite().all()) for group in optimizer.param_groups for p in group["params"])


def _load(
    data: bytes,
    make: Callable[[list[Tensor], int], Any],
    alone: Callable[[list[Tensor], int], torch.optim.Optimizer],
) -> None:
    """Load a damaged state and go on. What goes wrong may do so where the optimizer without jumps goes wrong too."""

    def damaged() -> dict[str, Any]:
        draw = Draw(data[1:])
        state = copy.deepcopy(_trained(make, kind, draw.one_of([4, 0, 5, 12])))
        damage(draw, state)
        return state

    kind = Draw(data).below(64)
    optimizer, other = make(_weights(kind, other=True), kind), alone(_weights(kind, other=True), kind)
    for _ in range(2):
        _step(optimizer)
    before = copy.deepcopy(optimizer.state_dict())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            optimizer.load_state_dict(damaged())
        except (ValueError, RuntimeError) as error:
            if not _same(before, optimizer.state_dict()):
                raise Finding("a state that was refused changed the optimizer") from error
            _step(optimizer)
            return
        try:
            for _ in range(4):
                _step(optimizer)
            optimizer.jump()
            optimizer.reset_anchor()
            optimizer.state_dict()
        except Exception:
            try:
                other.load_state_dict(damaged())
                for _ in range(4):
                    _step(other)
            except Exception:
                return
            raise
        if not _finite(optimizer) and not any(w.category is RuntimeWarning for w in said):
            other.load_state_dict(damaged())
            for _ in range(4):
                _step(other)
            if _finite(other):
                raise Finding("weights are not finite, and nothing was said")


def adam(data: bytes, folder: Path) -> None:
    """ExtraAdam's state."""
    _load(data, _adam, _alone)


def extra(data: bytes, folder: Path) -> None:
    """Extra's, around optimizers of torch's."""
    _load(data, _extra, _base)


# --- checkpoints ---


def _good(folder: Path, name: str) -> Path:
    """A small model in shards, an adapter, or a run of models, made once."""
    from safetensors.torch import save_file

    path = folder / "good" / name
    if path.exists():
        return path
    path.mkdir(parents=True)
    if name == "run":
        for step in 1, 2, 3:
            (path / f"checkpoint-{step}").mkdir()
            (path / f"checkpoint-{step}" / "config.json").write_text('{"model_type": "llama"}')
            weights = {"a.weight": torch.arange(6.0).reshape(2, 3) * step, "b": torch.ones(3) / step}
            save_file(weights, path / f"checkpoint-{step}" / "model.safetensors")
    elif name == "adapter":
        (path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1, "base_model_name_or_path": "x"}')
        factors = {"q.lora_A.weight": torch.ones(1, 3), "q.lora_B.weight": torch.ones(2, 1)}
        save_file(factors, path / "adapter_model.safetensors")
    else:
        (path / "config.json").write_text('{"model_type": "llama"}')
        save_file({"a": torch.ones(2, 3)}, path / "one.safetensors")
        save_file({"b": torch.ones(3)}, path / "two.safetensors")
        where = {"a": "one.safetensors", "b": "two.safetensors"}
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return path


def _one_line(error: Exception) -> None:
    if "\n" in str(error) or len(str(error)) > 4000:
        raise Finding(f"an error of {len(str(error))} characters, or lines") from error


def _read_all(path: Path, *, facts: bool = False) -> None:
    """Open a checkpoint and read everything in it."""
    try:
        opened = read.open_checkpoint(path)
        size = sum(file.stat().st_size for file in path.iterdir() if file.is_file())
        for name, info in opened.infos.items():
            if info.nbytes > size:
                raise Finding(f"{info.nbytes} bytes in files of {size}")
            if opened.read(name).shape != info.shape or opened.resolve(name) != name:
                raise Finding("a tensor is not as it was said to be")
        checkpoints.check_same_family(opened, opened)
        _ = opened.files, opened.shard_of(opened.names[0])
        if facts:
            _ = opened.model_facts
        checkpoints.find_checkpoints(path)
        models.base_of(str(path), None)
    except CheckpointError as error:
        _one_line(error)


def _replaced(folder: Path, good: str, name: str, data: bytes) -> Path:
    path = folder / "bad"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(_good(folder, good), path)
    (path / name).write_bytes(data)
    return path


def index(data: bytes, folder: Path) -> None:
    """The index of a checkpoint's shards."""
    _read_all(_replaced(folder, "shards", "model.safetensors.index.json", data))


def safetensors(data: bytes, folder: Path) -> None:
    """A file of weights."""
    _read_all(_replaced(folder, "shards", "model.safetensors", data))


def binary(data: bytes, folder: Path) -> None:
    """A file of weights by torch.save."""
    path = _replaced(folder, "shards", "pytorch_model.bin", data)
    (path / "model.safetensors.index.json").unlink()
    _read_all(path)


def config(data: bytes, folder: Path) -> None:
    """The config of an adapter or a model, and what is known of the model by it."""
    if data[:1] == b"{":
        _read_all(_replaced(folder, "shards", "config.json", data), facts=zlib.crc32(data) % 16 == 0 or not FUZZING)
    _read_all(_replaced(folder, "adapter", "adapter_config.json", data))


NAMES = ["checkpoint-1", "checkpoint-2", "global_step_3", "7", "x", "checkpoint-" + "9" * 200, "actor", "huggingface",
         "model.safetensors", "pytorch_model.bin", "adapter_model.safetensors", "model.safetensors.index.json",
         "config.json", "adapter_config.json", "trainer_state.json", "log.jsonl", "optimizer.pt", "a\nb-4"]  # fmt: skip


def tree(data: bytes, folder: Path) -> None:
    """A folder of files, folders, links that may lead round, and pipes, as a checkpoint, a run and a log."""
    draw, root = Draw(data), folder / "tree"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    good = [file for name in ("run", "shards", "adapter") for file in sorted(_good(folder, name).rglob("*"))]
    for _ in range(1 + draw.below(6)):
        inside = draw.one_of([root, *(path for path in sorted(root.rglob("*")) if os.path.isdir(path))])
        path, how = inside / draw.one_of(NAMES), draw.below(5)
        if os.path.lexists(path):  # opening a pipe to write to it would wait for ever
            continue
        with contextlib.suppress(OSError):
            if how == 0:
                path.mkdir()
            elif how == 1:
                os.mkfifo(path)
            elif how == 2:
                path.symlink_to(draw.one_of([path.name, ".", "..", "absent", "/dev/zero", "checkpoint-1", "x" * 300]))
            elif how == 3:
                path.write_bytes(draw.one_of([b"", b"{}", b"[" * 90_000, b'{"step": 1, "loss": 2}\n', b"\xff"]))
            else:
                source = draw.one_of(good)
                (shutil.copytree if source.is_dir() else shutil.copyfile)(source, path)
    for path in [root, *sorted(root.rglob("*"))]:
        for read_it in (_read_all, _find, _summarize):
            read_it(path)


def _find(path: Path) -> None:
    try:
        checkpoints.find_checkpoints(path)
    except CheckpointError as error:
        _one_line(error)


# --- logs ---


def _summarize(path: Path, *, page: bool = False) -> None:
    try:
        run = read_run(path)
        summary = summarize(run)
        json.dumps(summary)
        if page:
            html(run, summary)
    except CheckpointError as error:
        _one_line(error)


def log(data: bytes, folder: Path) -> None:
    """A log, as JSON lines and as a Trainer's."""
    page = zlib.crc32(data) % 256 == 0 or not FUZZING
    for name in "log.jsonl", "trainer_state.json":
        (folder / name).write_bytes(data)
        _summarize(folder / name, page=page)


LOGGED = ["step", "extra/gate", "extra/length", "loss", "reward", "eval_loss", "learning_rate", "extra/coherence",
          "extra/drift_norm", "extra/jumped", "extra/refused", "train_runtime", "eval_<b>"]  # fmt: skip


def run(data: bytes, folder: Path) -> None:
    """A log with odd numbers beside the damaged state of an optimizer."""
    draw = Draw(data)
    state = copy.deepcopy(_trained(_adam, draw.below(16), 4))
    if draw.below(4):
        damage(draw, state)
    path = folder / "run"
    path.mkdir(exist_ok=True)
    try:
        torch.save(state, path / "optimizer.pt")
    except Exception:  # no file could hold it
        return
    rows: list[dict[str, Any]] = [{"step": i + 1, "extra/gate": 0.5, "loss": 1.0} for i in range(draw.below(12))]
    for row in [*rows, {"step": 99}]:
        for _ in range(draw.below(4)):
            row[draw.one_of(LOGGED)] = draw.one_of([*NUMBERS, None, "1e3", "x", [], {}])
    (path / "log.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"step": 99}])))
    _summarize(path, page=zlib.crc32(data) % 128 == 0 or not FUZZING)


class _Letters:
    """A tokenizer without a chat template."""

    bos_token_id = eos_token_id = chat_template = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def prompts(data: bytes, folder: Path) -> None:
    """Prompts to answer, and responses to score."""
    for name in "prompts.jsonl", "prompts.txt":
        file = folder / name
        file.write_bytes(data)
        for read_it in (read_prompts, lambda file: tokens.read_prompts(file, _Letters())):
            try:
                read_it(file)
            except CheckpointError as error:
                _one_line(error)


# --- the command line ---


WORDS = [
    "run", "run/checkpoint-1", "run/checkpoint-2", "run/checkpoint-3", "shards", "adapter", "absent", "loop", "pipe",
    "", ".", "-o", "out", "out/page.html", "--alpha", "--steps", "--to", "--sweep", "--eval", "--plot", "--fit", "ols",
    "line", "--average", "--include", "--exclude", "*", "[", "a*", "--lora", "factors", "--json", "--sample",
    "--min-move", "--min-values", "--plots", "--format", "png", "svg", "--base", "--batch-size", "--seed", "--prompts",
    "--steps-ahead", "--trust-remote-code", "--earlier", "--prompt", "echo 1 {dir}", "echo 'nan' {dir}", "echo '{dir}",
    "true {dir}", "printf \\377 {dir}", "{dir}", "0", "1", "2", "3", "-1", "0.5", "1,2,4", "1,,2", "0,1e300,5",
    "0,1e-300,2", "1,2,3", "nan", "inf", "-inf", "1e308", "1e-320", "9" * 30, "9" * 400, "\u00b2", "\ud800", "x.txt",
    "x.svg", "--help", "--", "--no-such",
]  # fmt: skip
COMMANDS = ["extrapolate", "linearity", "report", "generate", "--help", "no-such", "--version"]


def command(data: bytes, folder: Path) -> None:
    """Words after `extraopt`: an exit code, no traceback, and one line where it refuses."""
    draw, here = Draw(data), folder / "cli"
    if not here.exists():
        shutil.copytree(_good(folder, "run"), here / "run")
        for name in "shards", "adapter":
            shutil.copytree(_good(folder, name), here / name)
        (here / "run" / "log.jsonl").write_text('{"step": 1, "extra/gate": 0.5}\n')
        (here / "loop").symlink_to("loop")
        os.mkfifo(here / "pipe")
    for name in "out", "x.svg", "--", "9":
        shutil.rmtree(here / name, ignore_errors=True)
    words = [draw.one_of(COMMANDS), *(draw.one_of(WORDS) for _ in range(draw.below(10)))]
    out, err, code = io.StringIO(), io.StringIO(), None
    with _within(here, ["extraopt", *words]), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.run()
        except SystemExit as stop:
            code = stop.code
    said = err.getvalue().strip()
    if code not in (None, 0, 2) or "Traceback" in said:
        raise Finding(f"exit code {code}: {said[-300:]}")
    if said.startswith("extraopt: ") and len(said.splitlines()) > 1:
        raise Finding(f"more than a line: {said[:300]}")


@contextlib.contextmanager
def _within(folder: Path, words: list[str]) -> Iterator[None]:
    before, argv = os.getcwd(), sys.argv
    os.chdir(folder)
    sys.argv = words
    try:
        yield
    finally:
        os.chdir(before)
        sys.argv = argv


TARGETS: dict[str, Callable[[bytes, Path], None]] = {
    target.__name__: target
    for target in (adam, extra, index, safetensors, binary, config, tree, log, run, prompts, command)
}


def replay(name: str, data: bytes, folder: Path) -> None:
    """One input, in a folder of its own.

    Raises:
        Finding: it took too long.
        Exception: whatever else it did that none may do.
    """
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        TARGETS[name](data, folder)
    if time.process_time() - start > LONG and FUZZING:
        raise Finding("it took too long")


# --- fuzzing ---


@dataclass
class Record:
    """What became of a target.

    Attributes:
        executions: inputs tried.
        coverage: libFuzzer's count of places reached in extraopt.
        findings: kinds of what no input may do, by where in the code it happened.
    """

    target: str
    seconds: float
    executions: int
    coverage: int
    peak_mb: int
    findings: list[str]


def _kind(error: BaseException) -> str:
    """An error by its type and where it was raised, last of all in a file of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/extraopt/" in frame.filename]
    where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in (*ours[-1:], frames[-1]))
    says = re.sub(r"\d+", "#", str(error))[:80]
    return f"{type(error).__name__} at {where}: {says}"


def worker(name: str, keep: Path, options: list[str]) -> None:
    """Fuzz in this process, until libFuzzer ends it."""
    seen: dict[str, int] = {}
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(dir=keep))

    def one(data: bytes) -> None:
        try:
            replay(name, data, folder)
        except Exception as error:
            kind = _kind(error)
            if kind not in seen:
                (keep / f"{name}-{len(seen)}").write_bytes(data)
                (keep / f"{name}-{len(seen)}.txt").write_text(kind + "\n" + traceback.format_exc())
            seen[kind] = seen.get(kind, 0) + 1

    with contextlib.suppress(Exception):  # imports that wait for the first use are no input's fault
        replay(name, b"", folder)
    atheris.Setup([sys.argv[0], *options], one)
    atheris.Fuzz()


def fuzz(name: str, seconds: int, keep: Path) -> Record:
    """Fuzz a target for some seconds, from its corpus on."""
    found = keep / "found"
    found.mkdir(parents=True, exist_ok=True)
    words = keep / "words"
    words.write_text("".join(f'"{word}"\n' for word in (*map(str, KEYS), *LOGGED, "weight_map", "data_offsets", "F32")))
    options = [str(found), str(CORPUS / name), f"-max_total_time={seconds}", "-timeout=20", "-rss_limit_mb=4096"]
    options += ["-max_len=4096", "-print_final_stats=1", f"-artifact_prefix={keep}/{name}-", f"-dict={words}"]
    worker = [sys.executable, __file__, "--worker", name, "--keep", str(keep), *options]
    start = time.perf_counter()
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(worker, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    said = done.stderr.decode(errors="replace")
    kinds = [file.read_text().splitlines()[0] for file in sorted(keep.glob(f"{name}-*.txt"))]
    kinds += [file.name for mark in ("timeout", "oom", "crash") for file in sorted(keep.glob(f"{name}-{mark}-*"))]

    def last(pattern: str) -> int:
        return int(([*re.findall(pattern, said)] or ["0"])[-1])

    if done.returncode and not kinds:
        sys.exit(said[-4000:])
    executions = last(r"number_of_executed_units: (\d+)") or last(r"#(\d+)\t")
    peak = last(r"peak_rss_mb:\s+(\d+)") or last(r"rss: (\d+)Mb")
    return Record(name, round(time.perf_counter() - start, 1), executions, last(r"cov: (\d+)"), peak, kinds)


def main() -> None:
    """Fuzz and print what was found; 1 if anything was."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all of them")
    parser.add_argument("--json", type=Path, help="write the records here")
    parser.add_argument("--keep", type=Path, help="folder for inputs that do what none may do")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    asked, options = parser.parse_known_args()
    if asked.worker:
        worker(asked.worker, asked.keep, options)
    with tempfile.TemporaryDirectory() as scratch:
        keep = (asked.keep or Path(scratch)).resolve()
        records = []
        for name in asked.target or TARGETS:
            record = fuzz(name, asked.seconds, keep / name)
            records.append(vars(record))
            told = f"{record.executions:,} inputs in {record.seconds} s, {record.coverage} places, {record.peak_mb} MB"
            print(f"{name}: {told}, {len(record.findings)} findings", *record.findings, sep="\n  ", flush=True)
    if asked.json:  # what is there of other targets stays
        before = json.loads(asked.json.read_text())["records"] if asked.json.exists() else []
        latest = {record["target"]: record for record in [*before, *records]}
        about = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
        corpus = {name: len([*(CORPUS / name).glob("*")]) for name in TARGETS}
        asked.json.parent.mkdir(parents=True, exist_ok=True)
        written = {**about, "corpus": corpus, "records": [latest[name] for name in TARGETS if name in latest]}
        asked.json.write_text(json.dumps(written, indent=1) + "\n")
    sys.exit(any(itertools.chain.from_iterable(record["findings"] for record in records)))


if __name__ == "__main__":
    main()
