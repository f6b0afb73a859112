"""What a step of ExtraAdam costs, against torch's AdamW of the same implementation, side by side in one run.

Both optimizers hold the same tensors' shapes and step in turn, so that a busy moment of the machine hits both. Reported
are medians over cycles: a step that ends no cycle as a ratio to AdamW's step; the end of a cycle in milliseconds and,
spread over the k steps of its cycle, as a percentage of AdamW's step; and the extra state in copies of the parameters.

    python benchmarks/step.py [--quick] [--json benchmarks/results/step.json]
"""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from extraopt import ExtraAdam, __version__

EVERY = 10


def gpt2_small() -> list[tuple[int, ...]]:
    """The 148 parameters of GPT-2 small: 124.4 M elements."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


def lora() -> list[tuple[int, ...]]:
    """A LoRA adapter of rank 16 on all linear layers of Qwen2-1.5B: 392 tensors, 18.5 M elements."""
    d, kv, ff, r = 1536, 256, 8960, 16
    linear = [(d, d), (d, kv), (d, kv), (d, d), (d, ff), (d, ff), (ff, d)]
    return [shape for _ in range(28) for i, o in linear for shape in ((r, i), (o, r))]


LISTS: dict[str, Callable[[], list[tuple[int, ...]]]] = {"gpt2": gpt2_small, "lora": lora}
IMPLEMENTATIONS = {"for-loop": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


def parameters(shapes: list[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator, device=device) * 0.02) for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, device=device)
    return params


def milliseconds(step: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def measure(name: str, implementation: str, cycles: int, device: str) -> dict[str, Any]:
    options = {"lr": 1e-4, **IMPLEMENTATIONS[implementation]}
    adamw = torch.optim.AdamW(parameters(LISTS[name](), device), **options)
    params = parameters(LISTS[name](), device)
    extra = ExtraAdam(params, extra_every=EVERY, **options)
    times: dict[str, list[float]] = {"adamw": [], "plain": [], "end": []}
    for cycle in range(cycles + 1):  # the first one warms up and makes the state
        for t in range(1, EVERY + 1):
            pair = [(adamw, "adamw"), (extra, "end" if t == EVERY else "plain")]
            for optimizer, key in pair if t % 2 else reversed(pair):
                spent = milliseconds(optimizer.step, device)
                if cycle:
                    times[key].append(spent)
    assert extra.last_jump is not None and extra.last_jump.step == EVERY * (cycles + 1)
    median = {key: statistics.median(values) for key, values in times.items()}
    state = sum(
        v.nbytes for s in extra.state.values() for k, v in s.items() if k.startswith("extra_") and torch.is_tensor(v)
    )
    return {
        "list": name,
        "tensors": len(params),
        "elements": sum(p.numel() for p in params),
        "implementation": implementation,
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "cycles": cycles,
        "adamw_ms": median["adamw"],
        "step_ratio": median["plain"] / median["adamw"],
        "end_ms": median["end"] - median["plain"],
        "spread_percent": 100 * (median["end"] - median["plain"]) / EVERY / median["adamw"],
        "jumped": extra.last_jump.jumped,
        "extra_copies": state / sum(p.nbytes for p in params),
    }


def main(
    quick: Annotated[bool, typer.Option(help="Few cycles and one thread count, for a look.")] = False,
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts on a CPU.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure steps of AdamW and ExtraAdam side by side."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = threads or ([1] if quick or device == "cuda" else [1, 2])
    jobs = [(name, impl, count) for count in counts for name in LISTS for impl in IMPLEMENTATIONS]
    rows = []
    for name, impl, count in track(jobs, "measuring", console=Console(stderr=True)):
        torch.set_num_threads(count)
        rows.append(measure(name, impl, 1 if quick else 5, device))

    title = f"ExtraAdam {__version__} against torch {torch.__version__} AdamW, k = {EVERY}, {rows[0]['device']}"
    table = Table(title=title, box=box.MARKDOWN)
    for column in ("list", "implementation", "threads", "AdamW step", "step without a jump", "end of a cycle"):
        table.add_column(column, justify="left" if column in ("list", "implementation") else "right")
    table.add_column("spread over k", justify="right")
    table.add_column("extra state", justify="right")
    for row in rows:
        table.add_row(
            row["list"], row["implementation"], str(row["threads"]), f"{row['adamw_ms']:.1f} ms",
            f"{row['step_ratio']:.3f}x", f"{row['end_ms']:.1f} ms", f"{row['spread_percent']:.1f} %",
            f"{row['extra_copies']:g} copies",
        )  # fmt: skip
    Console(width=120).print(table)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
