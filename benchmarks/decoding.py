"""What logits extrapolation costs against plain `generate` on the same model, side by side in one run.

SmolLM2-135M generates greedily, plainly and extrapolated in turn: beyond a copy of itself that is a little off, and
beyond its base with a LoRA adapter switched off. Reported are medians over pairs of runs. On a CPU the time is that of
the process, by default on one thread, which a busy machine disturbs least. The bar is 2.1: two forward passes of one
token for each token, and 5 percent. How many passes there are is asserted, not measured.

    python benchmarks/decoding.py [--quick] [--json benchmarks/results/decoding.json]
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import peft
import torch
import transformers
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from extraopt.tools.decoding import LogitsExtrapolation

BAR = 2.1
EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "grpo_smollm2.py"
ROWS = [(1, 1), (8, 1), (2, 4)]  # prompts, beams


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line.split(":")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{os.cpu_count()} cores of {names[0].strip() if names else platform.machine()}"


def load() -> tuple[dict[str, tuple[Any, LogitsExtrapolation]], list[Any]]:
    """The generating models, each with what carries it further; and all models whose forward passes count."""
    spec = importlib.util.spec_from_file_location("grpo_smollm2", EXAMPLE)
    assert spec and spec.loader
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    later = transformers.AutoModelForCausalLM.from_pretrained(example.bundled_model(), dtype=torch.float32)
    later.to("cuda" if torch.cuda.is_available() else "cpu")
    earlier, under = copy.deepcopy(later), copy.deepcopy(later)
    with torch.no_grad():
        for p in earlier.parameters():
            p.mul_(1 + 0.01 * torch.randn_like(p))
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    adapter = peft.get_peft_model(under, config).eval()
    pairs = {
        "a second model": (later, LogitsExtrapolation(earlier, 0.5)),
        "LoRA off": (adapter, LogitsExtrapolation.adapter_off(adapter, 0.5)),
    }
    return pairs, [later, earlier, under]


def seconds(work: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.process_time()
        work()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(
    model: Any, processor: LogitsExtrapolation, prompts: int, beams: int, tokens: int, repeats: int, passes: list[int]
) -> dict[str, Any]:
    ids = torch.randint(100, 40000, (prompts, 32), generator=torch.Generator().manual_seed(0)).to(model.device)
    options: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": tokens, "num_beams": beams}
    options |= {"do_sample": False, "eos_token_id": -1, "pad_token_id": 0}

    def plain() -> None:
        model.generate(input_ids=ids, **options)

    def extrapolated() -> None:
        model.generate(input_ids=ids, logits_processor=[processor], **options)

    passes.clear()
    extrapolated()  # warms up, too
    assert passes == [32, 32] + [1] * (2 * tokens - 2), passes
    times: dict[Any, list[float]] = {plain: [], extrapolated: []}
    for i in range(repeats):
        for work in (plain, extrapolated) if i % 2 else (extrapolated, plain):
            times[work].append(seconds(work))
    ratios = [two / one for one, two in zip(times[plain], times[extrapolated])]
    return {
        "prompts": prompts,
        "beams": beams,
        "plain_ms_per_token": 1e3 * statistics.median(times[plain]) / tokens,
        "extrapolated_ms_per_token": 1e3 * statistics.median(times[extrapolated]) / tokens,
        "ratio": statistics.median(ratios),
        "ratio_of_medians": statistics.median(times[extrapolated]) / statistics.median(times[plain]),
        "ratio_quartiles": statistics.quantiles(ratios, n=4, method="inclusive")[::2],
    }


def main(
    quick: Annotated[bool, typer.Option(help="One repeat of few tokens, for a look.")] = False,
    tokens: Annotated[int, typer.Option(min=2, help="New tokens in each row.")] = 16,
    repeats: Annotated[int, typer.Option(min=2, help="Pairs of runs.")] = 7,
    threads: Annotated[int, typer.Option(help="On a CPU.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure plain and extrapolated generation side by side."""
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    if quick:
        tokens, repeats = 4, 2
    pairs, models = load()
    passes: list[int] = []
    for model in models:
        model.register_forward_pre_hook(lambda _, a, k: passes.append(k["input_ids"].shape[1]), with_kwargs=True)
    jobs = [(name, *row) for name in pairs for row in ROWS]
    rows = []
    for name, prompts, beams in track(jobs, "measuring", console=Console(stderr=True)):
        row = measure(*pairs[name], prompts, beams, tokens, repeats, passes)
        rows.append({"earlier": name, **row, "load": os.getloadavg()[0]})

    table = Table(title=f"SmolLM2-135M, float32, {machine()}, {threads} thread(s), {tokens} tokens", box=box.MARKDOWN)
    for column in ("earlier model", "prompts", "beams", "plain", "extrapolated", "ratio", "quartiles", "bar 2.1"):
        table.add_column(column, justify="left" if column == "earlier model" else "right")
    for row in rows:
        low, high = row["ratio_quartiles"]
        table.add_row(
            row["earlier"], str(row["prompts"]), str(row["beams"]), f"{row['plain_ms_per_token']:.1f} ms",
            f"{row['extrapolated_ms_per_token']:.1f} ms", f"{row['ratio']:.2f}x", f"{low:.2f} to {high:.2f}",
            "kept" if row["ratio"] <= BAR else "missed",
        )  # fmt: skip
    Console(width=120).print(table)
    if json_file is not None:
        setting = {
            "model": "SmolLM2-135M-Instruct, float32", "machine": machine(), "threads": threads,
            "torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
            "clock": "wall" if torch.cuda.is_available() else "process",
            "prompt_tokens": 32, "new_tokens": tokens, "repeats": repeats, "bar": BAR,
        }  # fmt: skip
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**setting, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
