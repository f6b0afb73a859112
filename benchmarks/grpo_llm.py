"""GRPO on a language model: AdamW, ExtraAdam and RL-Extra; all weights and LoRA; several tasks, learning rates, seeds.

    python benchmarks/grpo_llm.py --json FILE                   # SmolLM2-135M: hours on 2 cores
    python benchmarks/grpo_llm.py --preset qwen --json FILE     # a GPU and the hub
    python benchmarks/grpo_llm.py --preset paper --json FILE    # the paper's model and settings
    python benchmarks/grpo_llm.py --preset paper --dry-run      # on tiny random weights: before hours of a GPU
    python benchmarks/grpo_llm.py --report FILE                 # table and picture of what FILE has
    python benchmarks/grpo_llm.py --report FILE --page          # and the tables in docs/results.md

The trainer is TRL's own. Each run is written to FILE when it ends and is not repeated; one that was cut off resumes
from its last checkpoint. A run's curve is the mean reward of each step's completions, sampled before the step; its
entropy is that of the policy over them, in nats for each token. On sums its `minus` is how likely the policy begins the
answer to a question with a minus sign where the answer is negative: the mean over 48 questions, before training and
after each 5 steps.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import platform
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import datasets
import reasoning_gym
import torch
import transformers
import typer
from matplotlib.figure import Figure
from peft import LoraConfig
from PIL import Image
from rich.console import Console
from rich.progress import Progress, TaskID
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint
from trl import GRPOConfig, GRPOTrainer

from extraopt import ExtraAdam
from extraopt.integrations.transformers import ExtraCallback

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "grpo_smollm2.py"
spec = importlib.util.spec_from_file_location("grpo_smollm2", EXAMPLE)
assert spec and spec.loader
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)

PAGE = Path(__file__).resolve().parents[1] / "docs" / "results.md"
BEGIN, END = "<!-- made by benchmarks/grpo_llm.py -->", "<!-- end of grpo_llm -->"
BEGIN_EARLIER = "<!-- made by benchmarks/grpo_llm.py: other rules -->"
PAPER = {"extra_every": 20, "extra_steps": 100, "extra_beta": 0.0, "extra_gate": None, "extra_kl": None}
OPTIMIZERS: dict[str, tuple[type, dict[str, Any]]] = {
    "AdamW": (torch.optim.AdamW, {}),
    "ExtraAdam": (ExtraAdam, {}),
    "RL-Extra (20,100)": (ExtraAdam, PAPER),
}
# Of rules before; their rows stay, but can't be made any more. Those with a fall had a trust region, for the jump alone
# but for 0.5, which was from 1 % on, and let jumps be of any length. 0.2 and 0.8 are the present rule by other limits,
# but that, as in "from s on", no jump could be shorter than the real steps of its cycle.
WITH_A_FALL = " (k=10)", *(f" (fall {fall})" for fall in ("0.1", "0.2", "0.3", "0.3, no g^2", "0.5", "0.8"))
OTHER = "AdamW, another CPU"  # where ExtraAdam's machine has a run of AdamW's, too: rounding makes it another sample
OTHERS = "", " no rollback", " (5,25)", " (start 61)", *WITH_A_FALL, " (from s on)"
BEFORE = [f"before: ExtraAdam{of}" for of in OTHERS]
COLOURS = dict(
    zip(
        [*OPTIMIZERS, OTHER, *BEFORE],
        "#64748b #0072b2 #000000 #94a3b8 #d55e00 #e69f00 #009e73 #cc79a7 #56b4e9 #882255 "
        "#117733 #999933 #44aa99 #aa4499 #88ccee #ddcc77".split(),
        strict=True,
    )
)
SHOWN = "AdamW", "ExtraAdam"  # in pictures, and run by run
# places and learning rates that are told run by run; the first is what the README shows
COURSES = [(("chain_sum", "full", 32, "bf16 autocast"), lr) for lr in (1e-6, 1e-5)]
STYLES = "-", "--", ":", "-.", (0, (1, 4))  # of seeds
WINDOW = 20  # steps that a level is averaged over: one step's completions are few
LEVELS = (0.75, 0.8, 0.85)  # of reward, at which entropies are compared
ENDS = (40, 60, 80, 100, 150)  # steps up to which tables have a level


@dataclass(frozen=True)
class Preset:
    """A model and how it is trained.

    Attributes:
        tasks: name of each task, of reasoning-gym's up to a comma; options of these; tokens of its longest completion;
            whether it is put in the model's chat format, or left for it to write on.
        lrs: learning rates by tuning; AdamW and the default run at all, others at the first.
        prompts, group: questions in an optimizer step, and completions to each.
        generations: optimizer steps on one batch of completions.
    """

    model: str
    tasks: dict[str, tuple[dict[str, Any], int, bool]]
    lrs: dict[str, tuple[float, ...]]
    steps: int
    prompts: int
    group: int
    generations: int = 1
    micro_batch: int = 8
    seeds: tuple[int, ...] = (0,)
    options: dict[str, Any] = field(default_factory=dict)


ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
THREE_TERMS = ONE_DIGIT | {"min_terms": 3, "max_terms": 3}
PRESETS = {
    "smollm2": Preset(
        demo.BUNDLED,
        {
            "chain_sum": (ONE_DIGIT, 4, False), "chain_sum, three terms": (THREE_TERMS, 4, False),
            "syllogism": ({}, 2, True),
        },
        {"LoRA": (1e-4, 3e-4), "full": (3e-6, 1e-6, 1e-5)}, steps=60, prompts=8, group=4, micro_batch=32,
    ),
    "qwen": Preset(
        "Qwen/Qwen2.5-0.5B-Instruct", {"openai/gsm8k": ({}, 384, True)}, {"LoRA": (1e-5, 3e-5), "full": (1e-6, 3e-6)},
        steps=300, prompts=32, group=8, micro_batch=16,
    ),
    # arXiv 2601.04537, as far as its scripts say
    "paper": Preset(
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", {"agentica-org/DeepScaleR-Preview-Dataset": ({}, 16384, True)},
        {"full": (1e-6, 3e-6)}, steps=400, prompts=64, group=16, generations=2, micro_batch=1,
        options={"use_vllm": True, "vllm_mode": "colocate", "loss_type": "grpo", "weight_decay": 0.01},
    ),
}  # fmt: skip
PRESETS["qwen-1.5b"] = replace(PRESETS["qwen"], model="Qwen/Qwen2.5-1.5B-Instruct")


class Clock(TrainerCallback):
    """The seconds of each step, in the log, and the bar's progress."""

    def __init__(self, progress: Progress, bar: TaskID) -> None:
        self.progress, self.bar, self.last = progress, bar, time.perf_counter()

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_log(self, args, state, control, logs, **kwargs):
        if "loss" in logs:  # a step's log; the one at the end of training has averages
            now = time.perf_counter()
            state.log_history[-1]["seconds"], self.last = now - self.last, now
            note = {"note": f"reward {logs['reward']:.2f}"} if "reward" in logs else {}
            self.progress.update(self.bar, completed=state.global_step, **note)


class Minus(TrainerCallback):
    """How likely each negative answer of some sums begins with its sign."""

    def __init__(self, tokenizer: Any) -> None:
        made = reasoning_gym.create_dataset("chain_sum", size=2000, seed=77, **ONE_DIGIT)
        questions = [entry["question"] for entry in made if entry["answer"].startswith("-")][:48]
        self.inputs = tokenizer(questions, return_tensors="pt", padding=True, padding_side="left")
        self.signs = [tokenizer.encode(sign, add_special_tokens=False)[0] for sign in ("-", " -")]

    def on_train_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:
            self.on_step_end(args, state, control, model)

    @torch.no_grad()
    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % 5:
            return
        training = model.training
        chances = model.eval()(**self.inputs.to(model.device)).logits[:, -1].float().softmax(-1)[:, self.signs].sum(1)
        model.train(training)
        state.log_history.append({"step": state.global_step, "minus": float(f"{chances.mean():.2e}")})  # outlives a cut


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} cores of {names[0].partition(':')[2].strip()}" if names else platform.machine()


def precision() -> str:
    """What matrices are multiplied in here: a CPU that has to imitate bfloat16 takes a hundred times as long for it."""
    if torch.cuda.is_available():
        has = torch.cuda.is_bf16_supported()
    else:
        has = torch.cpu.get_capabilities().get("avx512_bf16", False)
    return "bf16 autocast" if has else "fp32"


def load(preset: Preset, task: str, seed: int) -> tuple[list[dict[str, Any]], Any]:
    options, _, chat = preset.tasks[task]
    if "/" in task:
        rows, score = demo.load_task(task, seed)
    else:
        made = reasoning_gym.create_dataset(task.partition(",")[0], size=2000, seed=seed, **options)
        rows = [{"prompt": entry["question"], "truth": i} for i, entry in enumerate(made)]
        score = lambda text, i: float(made.score_answer(text.strip(), made[i]))  # noqa: E731
    if chat:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    return rows, score


def train(
    preset: Preset, run: dict[str, Any], folder: Path, progress: Progress, more: Iterable[TrainerCallback] = ()
) -> dict[str, Any]:
    """One run, as a row of the results; `more` callbacks watch it."""
    rows, score = load(preset, run["task"], run["seed"])

    def reward(completions: list[Any], truth: list[Any], **kwargs: Any) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        return [score(text, t) for text, t in zip(texts, truth)]

    gpu = torch.cuda.is_available()
    accumulation = preset.prompts * preset.group // preset.micro_batch
    config = GRPOConfig(
        str(folder), max_steps=preset.steps, learning_rate=run["lr"], lr_scheduler_type="constant", seed=run["seed"],
        per_device_train_batch_size=preset.micro_batch, gradient_accumulation_steps=accumulation,
        steps_per_generation=preset.generations * accumulation, num_generations=preset.group,
        max_completion_length=preset.tasks[run["task"]][1], epsilon=0.2, epsilon_high=0.28, beta=0.0,
        use_cpu=not gpu, bf16=run["settings"]["precision"] == "bf16 autocast", gradient_checkpointing=gpu,
        logging_steps=1, disable_tqdm=True,
        report_to="none", save_strategy="steps", save_steps=20, save_total_limit=1, dataloader_pin_memory=False,
        **preset.options,
    )  # fmt: skip
    transformers.set_seed(config.seed)
    path = str(demo.bundled_model()) if preset.model == demo.BUNDLED else preset.model
    kind, hyperparameters = OPTIMIZERS[run["optimizer"]]
    bar = progress.add_task(
        f"{run['task']} {run['tuning']} {run['optimizer']} {run['lr']:g}", total=preset.steps, note=""
    )
    callbacks: list[TrainerCallback] = [Clock(progress, bar), *more]
    if kind is ExtraAdam:
        callbacks.append(ExtraCallback())
    tokenizer = AutoTokenizer.from_pretrained(path)
    trainer = GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM") if run["tuning"] == "LoRA" else None,
        callbacks=callbacks + [Minus(tokenizer)] * (preset.tasks[run["task"]][0] == ONE_DIGIT),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.optimizer_cls_and_kwargs = (kind, {"lr": run["lr"], "fused": True, **hyperparameters})
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)) if folder.exists() else None)
    # a run that was cut off after its last step takes one more when it resumes
    logs = [log for log in trainer.state.log_history if "loss" in log and log["step"] <= preset.steps]
    for before, log in zip(logs, logs[1:]):  # where several steps learn from the same completions, one logs the reward
        log.update({key: before[key] for key in ("reward", "entropy") if key not in log})
    minus = [[log["step"], log["minus"]] for log in trainer.state.log_history if "minus" in log]
    told = ("coherence", "gate", "length", "kl", "fall")
    jumps = [
        [log["step"], *(round(log[f"extra/{of}"], 4) if f"extra/{of}" in log else None for of in told)]
        for log in logs
        if "extra/gate" in log
    ]
    shutil.rmtree(folder)
    progress.remove_task(bar)
    return {
        **run,
        "curve": [[log["step"], round(log["reward"], 4)] for log in logs],
        "entropy": [round(log["entropy"], 4) for log in logs],
        "jumps": jumps,
        **({"minus": minus} if minus else {}),
        "seconds": round(sum(log["seconds"] for log in logs), 1),
    }


def rehearse(preset: Preset, folder: Path) -> None:
    """Every kind of run of a preset, on tiny random weights of its architecture: raises where a real one would."""
    from dry_run import ARCHITECTURES, tiny

    if preset.model not in ARCHITECTURES:
        raise typer.BadParameter(f"no dry run of {preset.model}: it needs no hub", param_hint="--dry-run")
    GRPOConfig(
        str(folder / "options"), use_cpu=True, bf16=False, **preset.options
    )  # vLLM's too, which is left out below
    small = tiny(preset, folder)
    if not (torch.cuda.is_available() and importlib.util.find_spec("vllm")):
        small = replace(small, options={k: v for k, v in small.options.items() if "vllm" not in k})
    settings = {"model": small.model, "steps": small.steps, "completions": 8, "precision": "fp32"}
    with Progress(*Progress.get_default_columns(), "{task.fields[note]}", console=Console(stderr=True)) as progress:
        for tuning, lrs in small.lrs.items():
            for task in small.tasks:
                for name in OPTIMIZERS:
                    run = {
                        "optimizer": name,
                        "settings": settings,
                        "task": task,
                        "tuning": tuning,
                        "lr": lrs[0],
                        "seed": 0,
                    }
                    row = train(small, run, folder / "run", progress)
                    if len(row["curve"]) != small.steps:
                        raise RuntimeError(f"{len(row['curve'])} of {small.steps} steps were logged: {run}")
                    print(f"{preset.model}, {tuning}, {name}: {small.steps} tiny steps, {len(row['jumps'])} cycles")


def level(rows: Iterable[dict[str, Any]], end: int) -> float:
    """The mean reward of the last `WINDOW` steps up to step `end`, over the runs that got there; -inf: none."""
    rewards = [[reward for step, reward in row["curve"] if end - WINDOW < step <= end] for row in rows]
    levels = [statistics.mean(each) for each in rewards if len(each) == min(WINDOW, end)]
    return statistics.mean(levels) if levels else -math.inf


def where(row: dict[str, Any]) -> tuple[str, str, int, str]:
    return row["task"], row["tuning"], row["settings"]["completions"], row["settings"]["precision"]


def values(row: dict[str, Any], what: str) -> list[list[float]]:
    """[[step, value], ...] of a row's reward, entropy, minus or length; of the first two, means of `WINDOW` steps."""
    if what == "minus":
        return row.get(what, [])
    if what == "length":
        return [[jump[0], jump[3]] for jump in row["jumps"] if len(jump) > 3]
    each = [reward for _, reward in row["curve"]] if what == "reward" else row.get(what, [])
    return [[s, statistics.mean(each[s - WINDOW : s])] for s in range(WINDOW, len(each) + 1)]


def paired(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows; AdamW's of another machine than ExtraAdam's are `OTHER` where there is one of the same machine."""

    def of(row: dict[str, Any]) -> tuple[Any, ...]:
        return where(row), row["lr"], row["seed"]

    ours = {of(row): row["machine"] for row in rows if row["optimizer"] == "ExtraAdam"}
    beside = {of(row) for row in rows if row["optimizer"] == "AdamW" and row["machine"] == ours.get(of(row))}
    return [
        {**row, "optimizer": OTHER}
        if row["optimizer"] == "AdamW" and of(row) in beside and row["machine"] != ours[of(row)]
        else row
        for row in rows
    ]


def longest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of AdamW's and ExtraAdam's runs the longest of each place, learning rate and seed, in this order."""
    found: dict[Any, dict[str, Any]] = {}
    for row in sorted(rows, key=lambda row: len(row["curve"])):
        if row["optimizer"] in SHOWN:
            found[where(row), row["lr"], row["optimizer"], row["seed"]] = row
    return [row for _, row in sorted(found.items())]


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    """AdamW and ExtraAdam where both have run: panels for each place and learning rate, a line for each seed."""
    labels = {
        "reward": f"reward, mean of {WINDOW} steps",
        "entropy": "entropy, nats a token",
        "minus": "probability of a minus sign\nbefore negative answers",
        "length": "length of the jump in steps",
    }
    shown = longest(rows)
    cells = sorted({(where(row), row["lr"]) for row in shown if row["optimizer"] == "ExtraAdam"})
    if not cells:
        return
    figure = Figure(figsize=(13, 3.4 * len(cells)), dpi=100, layout="constrained")
    for cell, part in zip(cells, figure.subfigures(len(cells), 1, squeeze=False).flat):
        (task, tuning, completions, precision), lr = cell
        title = f"{task}, {tuning}, learning rate {lr:g}, {completions} completions a step, {precision}"
        part.suptitle(title, x=0.005, ha="left", fontsize=11)
        line = part.subplots(1, len(labels))
        here = [row for row in shown if (where(row), row["lr"]) == cell]
        seeds = sorted({row["seed"] for row in here if row["optimizer"] != "AdamW"})
        for (what, label), axes in zip(labels.items(), line):
            for row in here:
                points = values(row, what)
                if row["seed"] not in seeds or not points:
                    continue
                style = STYLES[seeds.index(row["seed"]) % len(STYLES)]
                name = f"{row['optimizer']}, seed {row['seed']}"
                axes.plot(*zip(*points), color=COLOURS[row["optimizer"]], ls=style, label=name)
            axes.set(xlabel="optimizer step", ylabel=label)
            axes.set_yscale("log" if what == "minus" else "linear")
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_visible(bool(axes.lines))  # not every task has a sign
        handles, names = line[0].get_legend_handles_labels()
        part.legend(handles, names, loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    figure.savefig(path)
    Image.open(path).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        path, optimize=True
    )


def table(rows: list[dict[str, Any]], of: Collection[str]) -> str:
    """AdamW beside these optimizers, where one of them has run with the same settings and seed.

    Means over seeds, of each seed's longest run, by windows of steps; in brackets how many seeds got there, where not
    all did. Bold: the best of those with the same learning rate.
    """
    heads = ["task, tuning, completions a step, precision", "optimizer", "lr", "seeds"]
    heads += [f"{end - WINDOW + 1}-{end}" for end in ENDS]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    groups: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in sorted(rows, key=lambda row: (where(row), row["lr"], row["settings"]["steps"])):
        groups.setdefault((where(row), row["lr"]), {}).setdefault(row["optimizer"], {})[row["seed"]] = row
    shown = None
    for (place, lr), by_name in groups.items():
        seeds = {seed for name, own in by_name.items() if name in of for seed in own}
        if not seeds:
            continue
        by_name = {**by_name, "AdamW": {seed: row for seed, row in by_name["AdamW"].items() if seed in seeds}}
        means = {n: [level(own.values(), end) for end in ENDS] for n, own in by_name.items() if n in (*of, "AdamW")}
        best = [max(column) for column in zip(*means.values())]
        for name in sorted(means, key=list(COLOURS).index):
            own, cells = by_name[name].values(), []
            for end, mean, top in zip(ENDS, means[name], best):
                there = sum(len(row["curve"]) >= end for row in own)
                cell = f"**{mean:.3f}**" if mean == top and len(means) > 1 else f"{mean:.3f}"
                cells.append(cell + f" ({there})" * (there < len(own)) if there else "")
            first = ", ".join(map(str, place)) if place != shown else ""
            star = "*" * any("note" in row for row in own)
            lines.append(" | ".join([f"| {first}", name + star, f"{lr:g}", str(len(own)), *cells]) + " |")
            shown = place
    return "\n".join(lines)


def small(chance: float) -> str:
    return f"{chance:.2f}" if chance >= 0.01 else f"{chance:.1g}"


def course(rows: list[dict[str, Any]], of: tuple[tuple[str, str, int, str], float]) -> str:
    """Run by run at one place and learning rate: the reward of each window of steps, and the minus sign at its end."""
    ends = range(WINDOW, 101, WINDOW)
    lines = ["| seed | optimizer | " + " | ".join(f"{end - WINDOW + 1}-{end}" for end in ends) + " |"]
    lines.append("|---|---|" + "---|" * len(ends))
    own = [row for row in longest(rows) if (where(row), row["lr"]) == of]
    both = {row["seed"] for row in own if row["optimizer"] == "ExtraAdam"}
    for row in sorted(own, key=lambda row: (row["seed"], row["optimizer"])):
        if row["seed"] in both:
            rewards, minus = (dict(map(tuple, values(row, what))) for what in ("reward", "minus"))
            cells = [f"{rewards[end]:.2f}, {small(minus[end])}" if end in rewards else "" for end in ends]
            lines.append(f"| {row['seed']} | {row['optimizer']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def entropies(rows: list[dict[str, Any]]) -> str:
    """The mean entropy of the first window of each seed whose mean reward comes to a level."""
    heads = ["tuning, completions a step, precision", "lr", "optimizer", "seeds", *(f"at {of:.2f}" for of in LEVELS)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    groups: dict[tuple[Any, ...], dict[str, dict[int, dict[str, Any]]]] = {}
    for row in longest(rows):
        if row["task"] == COURSES[0][0][0] and row.get("entropy"):
            groups.setdefault((where(row), row["lr"]), {}).setdefault(row["optimizer"], {})[row["seed"]] = row
    for (place, lr), by_name in groups.items():
        seeds = sorted(set.intersection(*(set(by_name.get(name, ())) for name in SHOWN)))
        for name in SHOWN if seeds else ():
            cells = []
            for of in LEVELS:
                at = [zip(values(row, "reward"), values(row, "entropy")) for row in map(by_name[name].get, seeds)]
                first = [next((f"{e:.2f}" for (_, reward), (_, e) in windows if reward >= of), "-") for windows in at]
                cells.append(", ".join(first) if set(first) != {"-"} else "")
            head = f"{', '.join(map(str, place[1:]))} | {lr:g} | {name} | {', '.join(map(str, seeds))}"
            lines.append(f"| {head} | {' | '.join(cells)} |")
    return "\n".join(lines)


def tables(rows: list[dict[str, Any]]) -> dict[str, str]:
    """What stands on the page after each of its marks."""
    rows = paired(rows)
    parts = [table(rows, ("ExtraAdam",))]
    for place, lr in COURSES:
        parts += [
            f"Run by run at learning rate {lr:g}, all weights, {place[2]} completions a step, {place[3]}: reward, and\n"
            "probability of a minus sign at the end of the window."
        ]
        parts += [course(rows, (place, lr))]
    parts += [
        f"Entropy by seed, in nats a token, over the {WINDOW} steps whose mean reward is the first to come to a level\n"
        "(-: it does not):"
    ]
    parts += [entropies(rows)]
    others = [name for name in COLOURS if name not in SHOWN]
    return {BEGIN: "\n\n".join(parts), BEGIN_EARLIER: table(rows, others)}


def report(rows: list[dict[str, Any]], path: Path, page: bool = False) -> None:
    rows = paired(rows)
    picture(rows, path)
    front = [row for row in rows if (where(row), row["lr"]) == COURSES[0]]
    picture(front, path.with_stem(f"{path.stem}_front"))
    print(table(rows, ("ExtraAdam",)))
    for begin, made in tables(rows).items() if page else ():
        before, _, rest = PAGE.read_text().partition(begin)
        PAGE.write_text(f"{before}{begin}\n{made}\n{END}{rest.partition(END)[2]}")


def main(
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "smollm2",
    json_file: Annotated[Path | None, typer.Option("--json", help="Where the rows go.")] = None,
    seeds: Annotated[int | None, typer.Option(help="Seeds; default: the preset's.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps of a run; default: the preset's.")] = None,
    group: Annotated[int | None, typer.Option(help="Completions to each question; default: the preset's.")] = None,
    only: Annotated[
        list[str], typer.Option(help="Only runs of this task, optimizer, tuning, lr or seed; several: of all of them.")
    ] = [],  # noqa: B006 (typer copies it)
    fp32: Annotated[bool, typer.Option("--fp32", help="Multiply in float32 where bfloat16 would be faster.")] = False,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints of the run under way.")] = Path("runs/grpo_llm"),
    report_file: Annotated[
        Path | None, typer.Option("--report", help="Only the table and picture of this file.")
    ] = None,
    page: Annotated[bool, typer.Option("--page", help="Put the tables of --report into their pages.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tiny random weights, made-up data; keeps nothing.")
    ] = False,
) -> None:
    """Train a language model by GRPO with each optimizer, and compare rewards."""
    if report_file is not None:
        report(json.loads(report_file.read_text()), report_file.with_suffix(".png"), page)
        return
    if preset not in PRESETS:
        raise typer.BadParameter(f"{preset!r} is none of {', '.join(PRESETS)}")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    chosen = PRESETS[preset]
    given = {"steps": steps, "group": group}
    chosen = replace(chosen, **{name: value for name, value in given.items() if value is not None})
    if dry_run:
        with tempfile.TemporaryDirectory() as folder:
            rehearse(chosen, Path(folder))
        return
    settings = {
        "model": chosen.model,
        "steps": chosen.steps,
        "completions": chosen.prompts * chosen.group,
        "precision": "fp32" if fp32 else precision(),
    }
    runs = [
        {
            "optimizer": name,
            "settings": settings,
            "task": task,
            "algorithm": "GRPO",
            "tuning": tuning,
            "lr": lr,
            "seed": s,
        }
        for s in (range(seeds) if seeds is not None else chosen.seeds)
        for tuning, lrs in chosen.lrs.items()
        for task in chosen.tasks
        for name in OPTIMIZERS
        for lr in (lrs if name.startswith(("AdamW", "ExtraAdam")) else lrs[:1])
    ]
    wanted = {(run["task"], run["tuning"], run["optimizer"], f"{run['lr']:g}", str(run["seed"])): run for run in runs}
    wanted = {words: run for words, run in wanted.items() if set(only) <= set(words)}
    if not wanted:
        raise typer.BadParameter(f"no run has all of {', '.join(only)}", param_hint="--only")
    rows = json.loads(json_file.read_text()) if json_file and json_file.exists() else []
    with Progress(*Progress.get_default_columns(), "{task.fields[note]}", console=Console(stderr=True)) as progress:
        bar = progress.add_task("runs", total=len(wanted), note="")
        for words, run in wanted.items():
            if not any(all(row[key] == value for key, value in run.items()) for row in rows):
                sizes = [str(chosen.group), str(chosen.steps)]
                folder = work / "-".join([*words, *sizes]).replace("/", "-").replace(" ", "")
                rows.append(train(chosen, run, folder, progress) | {"machine": machine()})
                if json_file is not None:
                    json_file.parent.mkdir(parents=True, exist_ok=True)
                    json_file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            progress.advance(bar)
    if json_file is not None:
        report(rows, json_file.with_suffix(".png"))


if __name__ == "__main__":
    typer.run(main)
