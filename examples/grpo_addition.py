"""GRPO at a conservative learning rate, with AdamW and with ExtraAdam: how many real steps does each need?

    python examples/grpo_addition.py                  # two minutes on 2 CPU cores, no network
    python examples/grpo_addition.py --seed 1 --rollouts 512 --lr 3e-5 --steps 240

A transformer of 0.3 million weights adds two numbers of two digits. It has learnt from a corpus in which most answers
are wrong, and goes on from a reward that a program checks: one cell of the toy-scale benchmark (benchmarks/rlvr). The
learning rate is a tenth of AdamW's best one here, as conservative as reinforcement learning of language models is run.
Both runs begin from the same policy, with the same questions.
"""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from extraopt import ExtraAdam

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks" / "rlvr"))
import compare
import lab

COLORS = {"AdamW": "#64748b", "ExtraAdam": "#0072b2"}
EVERY = 10  # steps between two evaluations
console = Console()


def train(
    name: str, policy: lab.Policy, task: lab.Task, lr: float, rollouts: int, steps: int, seed: int, progress: Progress
) -> dict[str, Any]:
    """One run: exact accuracy on held-out sums every `EVERY` steps, and what each jump did."""
    optimizer = {"AdamW": torch.optim.AdamW, "ExtraAdam": ExtraAdam}[name](policy.parameters(), lr=lr)
    if isinstance(optimizer, ExtraAdam):  # the policy answers with a tuple; of a model of transformers it needs no word
        optimizer.watch(policy, logits=lambda output: output[0][output[1]])
    generator = torch.Generator().manual_seed(seed)
    run: dict[str, Any] = {"accuracy": [[0, policy.accuracy(task)]], "jumps": []}
    bar, begun, step = progress.add_task(name, total=steps, note=""), time.perf_counter(), 0
    while step < steps:
        for loss, _ in lab.losses(policy, task, "GRPO", rollouts, generator):
            optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            optimizer.step()
            step += 1
            jump = getattr(optimizer, "last_jump", None)
            if jump is not None and jump.step == step and jump.length:
                run["jumps"].append({"step": step, "length": jump.length, "kl": jump.kl, "fall": jump.fall})
            if step % EVERY == 0:
                run["accuracy"].append([step, policy.accuracy(task)])
            progress.update(bar, completed=step, note=f"accuracy {run['accuracy'][-1][1]:.2f}")
    return {**run, "seconds": time.perf_counter() - begun}


def reached(run: dict[str, Any], accuracy: float) -> int | None:
    """The first step at which a run was as accurate."""
    return next((step for step, a in run["accuracy"] if a >= accuracy), None)


def draw(runs: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 5), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, run in runs.items():
        steps, accuracy = zip(*run["accuracy"])
        axes.plot(steps, accuracy, color=COLORS[name], linewidth=3, label=name)
        axes.annotate(f" {accuracy[-1]:.2f}", (steps[-1], accuracy[-1]), color=COLORS[name], weight="bold", va="center")
    at = dict(runs["ExtraAdam"]["accuracy"])
    jumps = [jump["step"] for jump in runs["ExtraAdam"]["jumps"] if jump["step"] in at]
    axes.plot(jumps, [at[step] for step in jumps], "o", color=COLORS["ExtraAdam"], markersize=4, label="jump")
    end = runs["AdamW"]["accuracy"][-1][1]
    if (step := reached(runs["ExtraAdam"], end)) is not None:
        axes.axhline(end, color=COLORS["AdamW"], linewidth=1, linestyle=":")
        axes.axvline(step, color=COLORS["ExtraAdam"], linewidth=1, linestyle=":")
        axes.annotate(
            f"AdamW's last accuracy after {step} steps", (step, 0.04), xytext=(6, 0), textcoords="offset points"
        )
    axes.set(title=title, xlabel="real steps", ylabel="accuracy on held-out sums", ylim=(0, 1))
    axes.margins(x=0.05)
    axes.grid(axis="y", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path)


def report(runs: dict[str, dict[str, Any]]) -> None:
    end = runs["AdamW"]["accuracy"][-1][1]
    table = Table("", *runs)
    rows: dict[str, list[str]] = {
        "accuracy before": [f"{run['accuracy'][0][1]:.3f}" for run in runs.values()],
        "accuracy at the end": [f"{run['accuracy'][-1][1]:.3f}" for run in runs.values()],
        "real steps to AdamW's last accuracy": [str(reached(run, end) or "-") for run in runs.values()],
        "seconds": [f"{run['seconds']:.0f}" for run in runs.values()],
        "jumps": [str(len(run["jumps"]) or "") for run in runs.values()],
    }
    for name, key, form in (("longest jump, in steps", "length", ".0f"), ("largest KL of a cycle", "kl", ".4f")):
        found = [[jump[key] for jump in run["jumps"] if not math.isnan(jump[key])] for run in runs.values()]
        rows[name] = [format(max(values), form) if values else "" for values in found]
    for name, cells in rows.items():
        table.add_row(name, *cells)
    console.print(table)


def main(
    lr: Annotated[float, typer.Option(help="Learning rate of both optimizers; AdamW's best here is 1e-4.")] = 1e-5,
    rollouts: Annotated[int, typer.Option(help="Answers that are sampled for a step.")] = 64,
    steps: Annotated[int, typer.Option(min=EVERY, help="Real steps of each run.")] = 400,
    seed: Annotated[int, typer.Option(help="Of the policy and of the questions.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("runs/demo"),
) -> None:
    """Train a small policy by GRPO with AdamW and with ExtraAdam, and compare the real steps that they need."""
    torch.set_num_threads(1)
    words = "{task.description:10}", "{task.fields[note]}"
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    console.print(f"Two-digit addition: GRPO, {rollouts} answers a step, learning rate {lr:g}, seed {seed}")
    with console.status("pre-training the policy, once for each seed"):
        compare.weak_policy("addition", seed)
    runs = {}
    with Progress(TextColumn(words[0]), *columns, TextColumn(words[1]), console=console) as progress:
        for name in COLORS:
            task, policy = compare.weak_policy("addition", seed)
            runs[name] = train(name, policy, task, lr, rollouts, steps, seed, progress)
    report(runs)
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, f"GRPO on two-digit addition, {rollouts} answers a step, learning rate {lr:g}", out / "demo.png")
    (out / "demo.json").write_text(json.dumps({"lr": lr, "rollouts": rollouts, "seed": seed, "runs": runs}) + "\n")
    console.print(f"Curves: {out / 'demo.png'}   Numbers: {out / 'demo.json'}")


if __name__ == "__main__":
    typer.run(main)
