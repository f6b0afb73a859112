"""Bytes for each parameter on a GPU: weights, gradients and what an optimizer needs, at the peak of two cycles.

    python benchmarks/memory.py [--json benchmarks/results/gpu/memory.json]

The parameters are one rank's half of Llama-1B, 0.6 billion. `host` is pinned memory of the machine. The time is that of
the end of a cycle. flashoptim's AdamW (8-bit moments, 24-bit master weights) is a row where it is installed.
"""

from __future__ import annotations

import gc
import importlib
from pathlib import Path
from typing import Annotated, Any

import kernel
import step
import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

from extraopt import ExtraAdam

EVERY = 3
RULE = {"extra_every": EVERY}
PAPER = {**RULE, "extra_beta": 0.0, "extra_gate": None}


def optimizers() -> dict[str, tuple[Any, dict[str, Any]]]:
    found: dict[str, tuple[Any, dict[str, Any]]] = {
        "AdamW": (torch.optim.AdamW, {"fused": True}),
        "ExtraAdam": (ExtraAdam, {"fused": True, **RULE}),
        "ExtraAdam, extra_offload": (ExtraAdam, {"fused": True, **RULE, "extra_offload": True}),
        "ExtraAdam, RL-Extra's rule": (ExtraAdam, {"fused": True, **PAPER}),
        "ExtraAdam, RL-Extra's rule, extra_offload": (ExtraAdam, {"fused": True, **PAPER, "extra_offload": True}),
    }
    try:
        found["flashoptim AdamW"] = (importlib.import_module("flashoptim").FlashAdamW, {})
    except ImportError:
        print("flashoptim is not installed: pip install flashoptim")
    return found


def measure(name: str, kind: Any, options: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    shapes = kernel.llama(2048, 512, 8192, 16, 2, tied=True)
    params = [torch.nn.Parameter(torch.randn(s, device="cuda", dtype=dtype) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    if kind.__name__ == "FlashAdamW" and dtype == torch.float32:
        options = {**options, "master_weight_bits": None}  # the weights are
    optimizer = kind(params, lr=1e-5, **options)
    torch.cuda.reset_peak_memory_stats()
    times = [step.milliseconds(optimizer.step, "cuda") for _ in range(3 * EVERY)]
    count = sum(p.numel() for p in params)
    peak = torch.cuda.max_memory_allocated() - before
    states = (v for state in optimizer.state.values() for v in state.values())
    host = sum(v.nbytes for v in states if isinstance(v, torch.Tensor) and v.device.type == "cpu" and v.dim())
    return {
        "optimizer": name,
        "dtype": str(dtype).removeprefix("torch."),
        "device": torch.cuda.get_device_name(),
        "parameters": count,
        "bytes_per_parameter": peak / count,
        "host_bytes_per_parameter": host / count,
        "step_ms": sorted(times[-3:-1])[0],
        "end_ms": times[-1] - sorted(times[-3:-1])[0],
    }


def main(json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None) -> None:
    """Measure the memory of optimizers."""
    if not torch.cuda.is_available():
        raise SystemExit("This measures memory of a CUDA device, and there is none.")
    rows = [
        measure(name, kind, options, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for name, (kind, options) in optimizers().items()
    ]
    table = Table("optimizer", "dtype", "on the GPU", "host", "step", "end of a cycle", box=box.MARKDOWN)
    for row in rows:
        sizes = (f"{row[key]:.1f} B" for key in ("bytes_per_parameter", "host_bytes_per_parameter"))
        end = f"{row['end_ms']:.0f} ms" if "ExtraAdam" in row["optimizer"] else ""
        table.add_row(row["optimizer"], row["dtype"], *sizes, f"{row['step_ms']:.1f} ms", end)
    console = Console(width=120)
    console.print(f"{rows[0]['device']}, {rows[0]['parameters'] / 1e6:.0f} M parameters")
    console.print(table)
    step.write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
