"""What a step of ExtraAdam costs, against torch's AdamW of the same implementation, side by side in one run.

Both optimizers hold the same tensors' shapes and step in turn, so that a busy moment of the machine hits both. Reported
are medians over cycles: a step that ends no cycle as a ratio to AdamW's step; the end of a cycle in milliseconds and,
spread over the k steps of its cycle, as a percentage of AdamW's step; and the extra state in copies of the parameters.

    python benchmarks/step.py [--quick] [--json benchmarks/results/step.json]

With --training, what the end of a cycle is of whole training steps, the trust region's forward passes included: GPT-2
small on batches of 4 x 128 tokens (on a GPU 16 x 1024, bf16 autocast), and, on a CPU, TRL's GRPO on SmolLM2-135M with a
LoRA adapter and with all weights, with completions of four tokens: longer ones cost generation, and no pass more.

    python benchmarks/step.py --training [--json benchmarks/results/training_step.json]
"""

from __future__ import annotations

import functools
import json
import platform
import statistics
import tempfile
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

EVERY = 5


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


def groups() -> list[tuple[int, ...]]:
    """300 small matrices, each in a group of its own, as layer-wise learning rates make them: 1.2 M elements."""
    return [(64, 64)] * 300


LISTS: dict[str, Callable[[], list[tuple[int, ...]]]] = {"gpt2": gpt2_small, "lora": lora, "groups": groups}
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
    others, params = (parameters(LISTS[name](), device) for _ in range(2))
    one_each = name == "groups"
    adamw = torch.optim.AdamW([{"params": [p]} for p in others] if one_each else others, **options)
    grouped: Any = [{"params": [p]} for p in params] if one_each else params
    extra = ExtraAdam(grouped, extra_every=EVERY, extra_watch=False, **options)
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


def gpt2_training(optimizer: type[ExtraAdam], steps: int) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    device, batch = ("cuda", (16, 1024)) if torch.cuda.is_available() else ("cpu", (4, 128))
    model = GPT2LMHeadModel(GPT2Config()).to(device)
    stepper = optimizer(model.parameters())
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        tokens = torch.randint(50257, batch, generator=generator).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        stepper.step()
        stepper.zero_grad()


def grpo_training(tuning: str, optimizer: type[ExtraAdam], steps: int) -> None:
    import grpo_llm

    preset = grpo_llm.Preset(**{**grpo_llm.PRESETS["smollm2"].__dict__, "steps": steps})
    run = {"task": "chain_sum", "tuning": tuning, "optimizer": "ExtraAdam", "lr": 1e-6, "seed": 0}
    run["settings"] = {"precision": "fp32"}
    grpo_llm.OPTIMIZERS["ExtraAdam"] = (optimizer, {})
    with tempfile.TemporaryDirectory() as folder, grpo_llm.Progress(console=Console(stderr=True)) as progress:
        grpo_llm.train(preset, run, Path(folder) / "run", progress)


def measure_training(name: str, train: Callable[[type[ExtraAdam], int], None], cycles: int) -> dict[str, Any]:
    """Medians of a training step without a jump, and of what the end of a cycle adds to it."""
    steps: list[float] = []
    spent: list[float] = []
    ends: list[float] = []
    clock = {"step began": 0.0, "step before ended": 0.0}

    class Timed(ExtraAdam):
        def __init__(self, params: Any, **options: Any) -> None:
            super().__init__(params, extra_every=EVERY, **{**options, "lr": 1e-5, "fused": True})
            self.register_step_pre_hook(lambda *args: clock.update({"step began": self.now()}))
            self.register_step_post_hook(self.note)

        def now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

        def note(self, *args: Any) -> None:
            now = self.now()
            (ends if len(steps) % EVERY == EVERY - 1 else spent).append(now - clock["step began"])
            steps.append(now - clock["step before ended"])
            clock["step before ended"] = now

    train(Timed, EVERY * cycles)
    step = statistics.median(t for i, t in enumerate(steps) if i and i % EVERY != EVERY - 1)  # the first has no start
    end = statistics.median(ends[1:]) - statistics.median(spent)  # the first cycle jumps nowhere
    return {
        "training": name,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
        "step_ms": 1e3 * step,
        "optimizer_ms": 1e3 * statistics.median(spent),
        "end_ms": 1e3 * end,
        "share_percent": 100 * end / EVERY / step,
        "share_percent_k10": 100 * end / 10 / step,
    }


def report_training(cycles: int, json_file: Path | None) -> None:
    tokens = "16 x 1024 tokens, bf16 autocast" if torch.cuda.is_available() else "4 x 128 tokens"
    kinds = {f"GPT-2 small, {tokens}": gpt2_training}
    if not torch.cuda.is_available():
        for tuning in ("LoRA", "full"):
            kinds[f"GRPO, SmolLM2-135M, {tuning}, 32 completions"] = functools.partial(grpo_training, tuning)
    rows = [measure_training(name, train, cycles) for name, train in kinds.items()]
    table = Table(
        "training", "whole step", "AdamW's part", "end of a cycle", "over k = 5 steps", "k = 10", box=box.MARKDOWN
    )
    for row in rows:
        times = (f"{row[key]:.1f} ms" for key in ("step_ms", "optimizer_ms", "end_ms"))
        table.add_row(row["training"], *times, f"{row['share_percent']:.2f} %", f"{row['share_percent_k10']:.2f} %")
    Console(width=120).print(table)
    write(rows, json_file)


def write(rows: list[dict[str, Any]], json_file: Path | None) -> None:
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(rows, indent=1) + "\n")


def main(
    quick: Annotated[bool, typer.Option(help="Few cycles and one thread count, for a look.")] = False,
    threads: Annotated[list[int] | None, typer.Option(help="Thread counts on a CPU.")] = None,
    training: Annotated[bool, typer.Option(help="Whole training steps instead.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure steps of AdamW and ExtraAdam side by side."""
    if training:
        report_training(2 if quick else 4, json_file)
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    counts = threads or ([1] if quick or device == "cuda" else [1, 2])
    jobs = [(name, impl, count) for count in counts for name in LISTS for impl in IMPLEMENTATIONS]
    rows = []
    for name, impl, count in track(jobs, "measuring", console=Console(stderr=True)):
        torch.set_num_threads(count)
        rows.append(measure(name, impl, 1 if quick else 10 if device == "cuda" else 5, device))

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
    write(rows, json_file)


if __name__ == "__main__":
    typer.run(main)
