"""Weight extrapolation against mergekit's linear merge with weights (1 + alpha, -alpha), on the same two checkpoints.

    python benchmarks/merge.py --json benchmarks/results/merge.json
    python benchmarks/merge.py --mergekit /path/to/venv/bin/mergekit-yaml

Models have the sizes of SmolLM2-135M, random weights and a drift of 1e-3. Each run is a process of its own; the tools
take turns. Without --mergekit it is installed into a temporary environment, since it asks for versions of its own.
The error is that of the stored numbers against float64 arithmetic, in units in the last place of their dtype: 0.5 is
what the nearest number can have.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

ALPHA = 1.6180339887  # multiplying by it is never exact and never ends halfway between two numbers
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDS = 3


def make_pair(folder: Path, dtype: torch.dtype) -> tuple[Path, Path]:
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder / "a")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "b")
    return folder / "a", folder / "b"


def install_mergekit(folder: Path) -> Path:
    venv.create(folder, with_pip=True)
    command = [
        folder / "bin" / "pip",
        "install",
        "--quiet",
        "mergekit==0.1.5",
        f"torch=={torch.__version__.split('+')[0]}",
    ]
    subprocess.run(command, check=True)
    return folder / "bin" / "mergekit-yaml"


def versions(python: Path, *names: str) -> dict[str, str]:
    code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
    done = subprocess.run([python, "-c", code, *names], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split()))


def measure(command: list[str]) -> dict[str, float]:
    """Seconds on the clock and of the processor, and the process's largest resident memory in MB.

    Memory is what the kernel says of the process while it runs: `ru_maxrss` of a child counts its parent's size too.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, text=True)
        peak = 0
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            if done:
                break
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak = max(peak, int(found[1]) if found else 0)
            time.sleep(0.01)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if status:
            said.seek(0)
            raise SystemExit(f"{command[0]} failed: {said.read()[-2000:]}")
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_mb": peak / 1024}


def error(a: Path, b: Path, out: Path) -> dict[str, float]:
    """Of every stored number, against float64."""
    absolute = units = 0.0
    wrong = count = 0
    with safe_open(a / "model.safetensors", "pt") as first, safe_open(b / "model.safetensors", "pt") as last:
        with safe_open(out / "model.safetensors", "pt") as new:
            for name in last.keys():
                stored = new.get_tensor(name)
                later = last.get_tensor(name).double()
                exact = later + ALPHA * (later - first.get_tensor(name).double())
                information = torch.finfo(stored.dtype)
                # in units of the last place of the result or the weight, whichever is larger: near 0 a sum of two
                # numbers has no places left that anybody could get right
                larger = torch.maximum(exact.abs(), later.abs()).clamp(min=information.smallest_normal)
                exponent = torch.frexp(larger)[1] - 1
                missed = (stored.double() - exact).abs()
                absolute = max(absolute, missed.max().item())
                units = max(
                    units, (missed / torch.ldexp(torch.tensor(information.eps).double(), exponent)).max().item()
                )
                wrong += int((stored != exact.to(stored.dtype)).sum())
                count += stored.numel()
    return {"max_error": absolute, "max_error_ulp": units, "not_nearest": wrong / count}


def main(
    mergekit: Annotated[Path | None, typer.Option(help="Its mergekit-yaml. Default: installed for this run.")] = None,
    results: Annotated[Path | None, typer.Option("--json", help="Where to write the rows.")] = None,
    rounds: int = ROUNDS,
) -> None:
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        tmp = Path(name)
        mergekit = mergekit or install_mergekit(tmp / "mergekit")
        known = {
            "extraopt": versions(Path(sys.executable), "torch", "transformers"),
            "mergekit": versions(mergekit.parent / "python", "mergekit", "torch", "transformers"),
        }
        imports = measure([sys.executable, "-c", "import torch, transformers; transformers.LlamaForCausalLM"])
        for dtype_name, dtype in DTYPES.items():
            a, b = make_pair(tmp / dtype_name, dtype)
            config = {
                "merge_method": "linear",
                "models": [
                    {"model": str(a), "parameters": {"weight": -ALPHA}},
                    {"model": str(b), "parameters": {"weight": 1 + ALPHA}},
                ],
                "parameters": {"normalize": False},
            }
            plain, wide = tmp / "plain.yml", tmp / "wide.yml"  # YAML is a superset of JSON
            plain.write_text(json.dumps(config))
            wide.write_text(json.dumps({**config, "dtype": "float32", "out_dtype": "bfloat16"}))
            ours = [sys.executable, "-m", "extraopt", "extrapolate", str(a), str(b), "--alpha", str(ALPHA), "-o"]
            commands = {"extraopt": ours, "mergekit": [str(mergekit), str(plain)]}
            if dtype_name == "bf16":
                commands["mergekit, dtype: float32"] = [str(mergekit), str(wide)]
            found: dict[str, list[dict[str, float]]] = {tool: [] for tool in commands}
            for turn in range(rounds):
                for tool, command in commands.items():
                    Console(stderr=True).print(f"{dtype_name}, round {turn + 1}: {tool}")
                    out = tmp / f"out-{len(list(tmp.iterdir()))}"
                    extra = [] if tool == "extraopt" else ["--no-copy-tokenizer", "--quiet"]
                    found[tool].append(measure([*command, str(out), *extra]) | error(a, b, out))
                    for file in out.iterdir():
                        file.unlink()
            for tool, runs in found.items():
                row = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
                rows.append({"dtype": dtype_name, "tool": tool, **row, "rounds": rounds})
                rows[-1]["versions"] = known[tool.split(",")[0]]

    table = Table("dtype", "tool", "seconds", "CPU seconds", "peak memory", "max error", "in ulp", "not nearest")
    for row in rows:
        table.add_row(
            row["dtype"], row["tool"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['peak_mb']:.0f} MB",
            f"{row['max_error']:.3g}", f"{row['max_error_ulp']:.3f}", f"{row['not_nearest']:.2%}",
        )  # fmt: skip
    Console().print(table)
    imported = f"{imports['cpu_seconds']:.1f} CPU seconds and {imports['peak_mb']:.0f} MB"
    Console().print(f"Importing torch and a model's class alone: {imported}. Medians of {rounds}.")
    if results:
        rows.append({"tool": "imports alone", **imports})
        results.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
