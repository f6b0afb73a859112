"""The figures of "Linear Dynamics in the RLVR Training of LLMs" (arXiv 2601.04537), on a run that a CPU can make.

    python benchmarks/reproduce.py                  # all stages, hours; again: only what is missing
    python benchmarks/reproduce.py path weights     # these stages
    python benchmarks/reproduce.py --page           # only the tables of docs/paper.md and its picture

The run is the row of grpo_llm.json with AdamW, learning rate 1e-6, all weights, float32, seed 0: SmolLM2-135M, GRPO,
one-digit sums; beside it stand ExtraAdam's and a LoRA adapter's. Weights are kept every 10 steps (9 GB in --work). Each
stage writes its part of benchmarks/results/reproduce.json when it ends and is not repeated; to make one again, delete
its part.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import Progress
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE / "rlvr")]  # one script is split into files

import grpo_llm  # noqa: E402
import reproduce_budgets as budgets  # noqa: E402
import reproduce_page as page  # noqa: E402
import reproduce_scores as scoring  # noqa: E402
from linearity import SaveWeights, rounded  # noqa: E402
from reproduce_statistics import mean_and_error, pass_at_k  # noqa: E402

from extraopt.tools.checkpoints import extrapolate as carry_on  # noqa: E402
from extraopt.tools.checkpoints import find_checkpoints  # noqa: E402
from extraopt.tools.checkpoints.linearity import linearity as measure_weights  # noqa: E402
from extraopt.tools.checkpoints.tokens import token_linearity  # noqa: E402
from extraopt.tools.decoding import LogitsExtrapolation, extrapolate  # noqa: E402

RUNS = {  # optimizer, tuning, learning rate
    "AdamW": ("AdamW", "full", 1e-6),
    "ExtraAdam": ("ExtraAdam", "full", 1e-6),
    "LoRA": ("AdamW", "LoRA", 1e-4),
}
EVERY = 10  # steps between checkpoints
SECONDS = (30, 50)  # the second checkpoint of an extrapolation; the first is the model before training
TARGETS = {30: (40, 60, 80, 100, 120, 150, 200, 300), 50: (60, 80, 100, 120, 150, 200, 250, 350)}
PAIRS = ((0, 30), (0, 50), (20, 150))  # of logits extrapolation; the last is placed as the paper's 200 and 1400
ALPHAS = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 9.0)
DRAWN = 64  # completions to each question
RESPONSES = 100  # whose log-probabilities are followed
Json = dict[str, Any]


class Shares(TrainerCallback):
    """Seconds of each part of a step: on a CPU those of the process, which other programs do not disturb."""

    def __init__(self) -> None:
        self.parts = {"generation": 0.0, "optimizer": 0.0, "passes": 0.0, "all": 0.0}
        self.steps: list[tuple[float, float]] = []  # of the optimizer's step and the forward passes in it
        self.within: str | None = None

    def now(self) -> float:
        if not torch.cuda.is_available():
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, owner: Any, name: str, part: str) -> None:
        """Put a clock around a method of one object."""
        inner = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            begin, before, self.within = self.now(), self.parts["passes"], part
            try:
                return inner(*args, **kwargs)
            finally:
                self.within = None
                self.parts[part] += self.now() - begin
                if part == "optimizer":
                    self.steps.append((self.now() - begin, self.parts["passes"] - before))

        setattr(owner, name, call)

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        self.timed(model, "generate", "generation")
        self.timed(getattr(optimizer, "optimizer", optimizer), "step", "optimizer")
        begun = []

        def begin(*_: Any) -> None:
            begun.append(self.now())

        def end(*_: Any) -> None:
            if self.within == "optimizer":  # the trust region's
                self.parts["passes"] += self.now() - begun[-1]

        model.register_forward_pre_hook(begin)
        model.register_forward_hook(end)

    def on_step_begin(self, args, state, control, **kwargs):
        self.begin = self.now()

    def on_step_end(self, args, state, control, **kwargs):
        self.parts["all"] += self.now() - self.begin

    def shares(self) -> Json:
        """Of the whole; what AdamW itself takes is the median of the steps without a forward pass."""
        whole = self.parts["all"]
        adamw = statistics.median(took for took, passes in self.steps if not passes) * len(self.steps)
        jump = self.parts["optimizer"] - self.parts["passes"] - adamw
        training = whole - self.parts["generation"] - self.parts["optimizer"]
        named = {"generation": self.parts["generation"], "training": training, "AdamW's step": adamw}
        named |= {"trust region": self.parts["passes"], "rest of the jump": jump}
        return {"steps": len(self.steps), "seconds_a_step": whole / len(self.steps)} | {
            "shares": {name: seconds / whole for name, seconds in named.items()}
        }


class Stages:
    """One method for each stage: it returns its part of the results."""

    def __init__(self, work: Path, steps: int, progress: Progress) -> None:
        self.work, self.steps, self.progress = work, steps, progress
        self.path_of_model = str(grpo_llm.demo.bundled_model())
        self.cache = work / "scores.json"  # of each checkpoint, question by question: stages share them
        self._task: scoring.Task | None = None

    # --- runs -------------------------------------------------------------------------------------------------------

    def train(self, name: str, steps: int, more: list[TrainerCallback]) -> Json:
        """One of `RUNS` as grpo_llm.py makes it, with its weights kept; cut off, it resumes."""
        folder, (optimizer, tuning, lr) = self.work / name, RUNS[name]
        made = json.loads((folder / "row.json").read_text()) if self.done(name) else None
        if made is None or made["settings"]["steps"] != steps:
            preset = replace(grpo_llm.PRESETS["smollm2"], steps=steps)
            settings = {"model": preset.model, "steps": steps, "completions": 32, "precision": "fp32"}
            run = {"optimizer": optimizer, "settings": settings, "task": "chain_sum", "algorithm": "GRPO"}
            run |= {"tuning": tuning, "lr": lr, "seed": 0}
            more = [*more, SaveWeights(folder, EVERY, torch.float32)]
            made = grpo_llm.train(preset, run, folder / "trainer", self.progress, more) | {
                "machine": grpo_llm.machine()
            }
            (folder / "row.json").write_text(json.dumps(made))
        return made

    def reference(self) -> Json:
        """The run, and whether it is the committed one."""
        row = self.train("AdamW", 150, [])
        committed = json.loads((HERE / "results" / "grpo_llm.json").read_text())
        same = ("optimizer", "task", "tuning", "lr", "seed")
        other = next(r for r in committed if all(r[k] == row[k] for k in same) and r["settings"] == row["settings"])
        equal = [mine == theirs for (_, mine), (_, theirs) in zip(row["curve"], other["curve"])]
        first = next((i + 1 for i, yes in enumerate(equal) if not yes), None)
        return {**row, "equal_steps": sum(equal), "first_other_step": first}

    def extra(self) -> Json:
        """The same with ExtraAdam and a clock in it."""
        clock = Shares()
        row = self.train("ExtraAdam", self.steps, [clock])
        file = self.work / "ExtraAdam" / "shares.json"
        if clock.steps:
            file.write_text(json.dumps(clock.shares()))
        return {**row, "clock": json.loads(file.read_text())}

    # --- scores -----------------------------------------------------------------------------------------------------

    @property
    def task(self) -> scoring.Task:
        if self._task is None:
            self._task = scoring.load_task(AutoTokenizer.from_pretrained(self.path_of_model))
        return self._task

    def checkpoint(self, step: int, run: str = "AdamW") -> Path:
        return self.work / run / f"checkpoint-{step}"

    def load(self, folder: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def known(self, folder: Path) -> Json | None:
        """The score of a folder, if it was made before."""
        known: Json = json.loads(self.cache.read_text()) if self.cache.exists() else {}
        return known.get(str(folder.relative_to(self.work)))

    def score(self, folder: Path) -> Json:
        """Each question's probability of full marks, and whether greedy decoding has them."""
        if (found := self.known(folder)) is not None:
            return found
        chance, greedy = scoring.scores(scoring.walk(self.load(folder), self.task), self.task)
        made = {"chance": [round(p, 5) for p in chance], "greedy": [int(g) for g in greedy]}
        known: Json = json.loads(self.cache.read_text()) if self.cache.exists() else {}
        self.cache.write_text(json.dumps(known | {str(folder.relative_to(self.work)): made}))
        return made

    def told(self, found: Json, last: Json | None = None) -> Json:
        """Means over the questions with standard errors; with `last`, differences to it, question by question."""
        made: Json = {name: mean_and_error(found[name]) for name in ("greedy", "chance")}
        for name in ("greedy", "chance") if last else ():
            made[f"{name}_less_last"] = mean_and_error([a - b for a, b in zip(found[name], last[name])])
        return made

    def along(self, what: str, items: list[Any]) -> Iterator[Any]:
        yield from self.progress.track(items, description=what)

    def path(self, run: str = "AdamW") -> list[Json]:
        """The trained run itself, at each of its checkpoints."""
        steps = list(range(0, 151, EVERY))
        return [
            {"step": s, **self.told(self.score(self.checkpoint(s, run)))}
            for s in self.along("trained checkpoints", steps)
        ]

    def weights(self, run: str = "AdamW") -> list[Json]:
        """`extraopt extrapolate A B --to`, from the model before training and each early checkpoint."""
        wanted = [(second, target) for second in SECONDS for target in (second, *TARGETS[second])]
        found: dict[tuple[int, int], Json] = {}
        for second, target in self.along("weight extrapolation", wanted):
            folder = self.checkpoint(second, run)
            if target > second:
                folder = self.work / run / f"from-{second}-to-{target}"
            if target > second and not self.known(folder):
                shutil.rmtree(folder, ignore_errors=True)
                carry_on([self.checkpoint(0, run), self.checkpoint(second, run)], folder, to=target)
            found[second, target] = self.score(folder)
            if target > second:
                shutil.rmtree(folder, ignore_errors=True)  # half a gigabyte
        last = self.score(self.checkpoint(150, run))
        return [
            {"second": second, "target": target, "alpha": target / second - 1, **self.told(score, last)}
            for (second, target), score in found.items()
        ]

    def logits(self) -> list[Json]:
        """Logits extrapolation by alpha; `generate` itself is asked once whether it chooses the same tokens."""
        rows, last = [], self.score(self.checkpoint(150))
        for one, two in self.along("logits extrapolation", list(PAIRS)):
            models = [self.load(self.checkpoint(step)) for step in (one, two)]
            earlier, later = (scoring.walk(model, self.task) for model in models)
            for alpha in ALPHAS:
                mixed = scoring.combine(later, earlier, lambda b, a, alpha=alpha: extrapolate(b, a, alpha))
                chance, greedy = scoring.scores(mixed, self.task)
                row = {"first": one, "second": two, "alpha": alpha, "target": two + alpha * (two - one)}
                row |= self.told({"chance": chance, "greedy": [int(g) for g in greedy]}, last)
                row["entropy"] = scoring.entropy(mixed)
                if (one, two) == PAIRS[-1] and alpha == 0.5:
                    ids = self.task.prompts
                    processor = LogitsExtrapolation(models[0], alpha)
                    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 4}
                    output = models[1].generate(input_ids=ids, logits_processor=[processor], **options)
                    texts = self.task.tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
                    row["generate_agrees"] = sum(self.task.right(i, t) == greedy[i] for i, t in enumerate(texts))
                rows.append(row)
        return rows

    def cooled(self) -> list[Json]:
        """What sharpening alone brings: `(1 + alpha) logits` of the last checkpoint, which is a temperature."""
        last, found = self.score(self.checkpoint(150)), scoring.walk(self.load(self.checkpoint(150)), self.task)
        rows = []
        for alpha in ALPHAS[:5]:
            mixed = scoring.combine(found, found, lambda b, _, alpha=alpha: (1 + alpha) * b)
            chance, greedy = scoring.scores(mixed, self.task)
            told = self.told({"chance": chance, "greedy": [int(g) for g in greedy]}, last)
            rows.append({"alpha": alpha, **told, "entropy": scoring.entropy(mixed)})
        return rows

    def passes(self) -> list[Json]:
        """pass@k before training, at the reference run's end, and where ExtraAdam is first as good."""
        chosen = [("before training", 0, "AdamW"), ("AdamW", 150, "AdamW")]
        level = statistics.fmean(self.score(self.checkpoint(150))["chance"])
        for step in sorted(s for s, _ in find_checkpoints(self.work / "ExtraAdam")) if self.done("ExtraAdam") else ():
            if statistics.fmean(self.score(self.checkpoint(step, "ExtraAdam"))["chance"]) >= level:
                chosen.append(("ExtraAdam", step, "ExtraAdam"))
                break
        rows = []
        negative = [i for i, entry in enumerate(self.task.entries) if entry["answer"].startswith("-")]
        for name, step, optimizer in self.along("pass@k", chosen):
            folder = self.checkpoint(step, optimizer)
            texts, entropy = scoring.sample(self.load(folder), self.task, DRAWN, 0)
            right = [sum(self.task.right(i, text) for text in each) for i, each in enumerate(texts)]
            exact = self.score(folder)["chance"]
            row = {"name": name, "step": step, "drawn": DRAWN, "entropy": entropy, "exact": statistics.fmean(exact)}
            for of, questions in (("all", list(range(len(right)))), ("negative", negative)):
                row[of] = {
                    str(k): mean_and_error([pass_at_k(DRAWN, right[i], k) for i in questions]) for k in (1, 8, 64)
                }
                row[of]["questions"] = len(questions)
            rows.append(row)
        return rows

    def lora(self) -> Json:
        """The run with a LoRA adapter: its path, its updates extrapolated, and how straight its factors are."""
        row = self.train("LoRA", 150, [])
        return {**row, "path": self.path("LoRA"), "weights": self.weights("LoRA"), "linearity": self.linearity("LoRA")}

    def done(self, run: str) -> bool:
        return (self.work / run / "row.json").exists()

    # --- linearity --------------------------------------------------------------------------------------------------

    def checkpoints(self, run: str = "AdamW") -> list[tuple[int, Path]]:
        return [(step, self.checkpoint(step, run)) for step in range(0, 151, EVERY)]

    def linearity(self, run: str = "AdamW") -> Json:
        """`extraopt linearity`: weights."""
        bar = self.progress.add_task("linearity of weights", total=None)
        report = measure_weights(
            self.checkpoints(run), progress=lambda done, of: self.progress.update(bar, completed=done, total=of)
        )
        kept = {name: report[name] for name in ("steps", "sample", "filter", "total", "advice", "verdict")}
        return kept | {"types": {name: of["r2_median"] for name, of in report["types"].items()}}

    def tokens(self) -> Json:
        """`extraopt linearity --prompts`: log-probabilities of completions that the last checkpoint sampled."""
        file = self.work / "prompts.jsonl"
        for _, folder in self.checkpoints():
            self.task.tokenizer.save_pretrained(folder)
        if not file.exists():
            texts, _ = scoring.sample(self.load(self.checkpoint(150)), self.task, 1, 0)
            pairs = zip(self.task.entries[::2], texts[::2])  # every other question: as many sums as differences
            lines = [{"prompt": entry["question"], "completion": each[0]} for entry, each in pairs if each[0]]
            file.write_text("".join(json.dumps(line) + "\n" for line in lines[:RESPONSES]))
        bar = self.progress.add_task("log-probabilities", total=None)
        report = token_linearity(
            self.checkpoints(), file, progress=lambda done, of: self.progress.update(bar, completed=done, total=of)
        )
        kept = {name: report[name] for name in ("examples", "steps", "filter", "total", "words")}
        return kept | {"tokens": report["tokens"][:8]}

    # --- from committed rows ----------------------------------------------------------------------------------------

    def budgets(self) -> list[Json]:
        """Reward at five budgets, steps to fixed rewards and sigmoids; see reproduce_budgets.py."""
        return budgets.every(HERE / "results")


STAGES = tuple("reference budgets path weights logits cooled linearity tokens lora extra passes".split())
ALWAYS = ("budgets",)  # a minute, and the rows that they are made from change


def plain(value: Any) -> Any:
    """Four digits, and null for what is no number: JSON has neither nan nor infinity."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else rounded(value)


def main(
    stages: Annotated[list[str] | None, typer.Argument(help=f"Among {', '.join(STAGES)}; default: all.")] = None,
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go.")] = page.RESULT,
    work: Annotated[Path, typer.Option(help="Folder for checkpoints.")] = Path("runs/reproduce"),
    steps: Annotated[int, typer.Option(help="Of ExtraAdam's run.")] = 100,
    page_only: Annotated[bool, typer.Option("--page", help="Only write the page's tables and picture.")] = False,
) -> None:
    """Make the stages that are missing, then the tables and the picture of docs/paper.md."""
    if unknown := set(stages or ()) - set(STAGES):
        raise typer.BadParameter(f"no stages: {', '.join(sorted(unknown))}")
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    work.mkdir(parents=True, exist_ok=True)
    columns = (*Progress.get_default_columns(),)
    with Progress(*columns, console=Console(stderr=True)) as progress:
        made = Stages(work.resolve(), steps, progress)
        for name in () if page_only else [name for name in STAGES if not stages or name in stages]:
            results = json.loads(json_file.read_text()) if json_file.exists() else {}
            if name in results and name not in ALWAYS:
                continue
            stage: Callable[[], Any] = getattr(made, name)
            part = plain(stage())
            results = json.loads(json_file.read_text()) if json_file.exists() else {}  # another stage may have ended
            results[name] = part
            ordered = {key: results[key] for key in STAGES if key in results} | results
            json_file.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in ordered.items()) + "\n}\n")
    page.write(json.loads(json_file.read_text()))


if __name__ == "__main__":
    typer.run(main)
