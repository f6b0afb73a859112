"""How straight are real runs? Three runs of SmolLM2-135M, saved every few steps, through `extraopt linearity`.

    python benchmarks/linearity.py [--work /tmp/linear] [--out benchmarks/results/linearity] [RUN ...]

The runs: GRPO on a LoRA adapter, GRPO on all weights (saved in bfloat16, as the paper's were), and supervised training
of the same adapter on the same task. AdamW makes the checkpoints: the question is how far its path can be extrapolated.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import datasets
import torch
import transformers
import typer
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "grpo_smollm2.py"
spec = importlib.util.spec_from_file_location("grpo_smollm2", EXAMPLE)
assert spec and spec.loader
demo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(demo)

COMMON: dict[str, Any] = {
    "lr_scheduler_type": "constant", "seed": 0, "save_strategy": "no", "report_to": "none", "logging_steps": 1,
    "disable_tqdm": True, "dataloader_pin_memory": False, "gradient_accumulation_steps": 1, "bf16": False,
}  # fmt: skip


class SaveWeights(TrainerCallback):
    """Weights alone, every few steps and before the first: a trainer's own checkpoints carry optimizer states too."""

    def __init__(self, folder: Path, every: int, dtype: torch.dtype):
        self.folder, self.every, self.dtype = folder, every, dtype
        self.logs: list[dict[str, float]] = []

    def save(self, model: Any, step: int) -> None:
        state = {name: tensor.to(self.dtype) for name, tensor in model.state_dict().items()}
        model.save_pretrained(self.folder / f"checkpoint-{step}", state_dict=state)

    def on_train_begin(self, args, state, control, model, **kwargs):
        if state.global_step == 0:  # else a run that was cut off goes on
            self.save(model, 0)

    def on_step_end(self, args, state, control, model, **kwargs):
        if state.global_step % self.every == 0:
            self.save(model, state.global_step)

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append({"step": state.global_step, **{k: v for k, v in logs.items() if k in ("reward", "loss")}})


def grpo(folder: Path, steps: int, save: SaveWeights, lr: float, lora: bool, completions: int = 32) -> None:
    rows, score = demo.load_task("chain_sum", 0)

    def reward(prompts: list[str], completions: list[str], truth: list[int], **kwargs: Any) -> list[float]:
        return [score(text, t) for text, t in zip(completions, truth)]

    config = GRPOConfig(
        str(folder), max_steps=steps, learning_rate=lr, per_device_train_batch_size=completions, num_generations=4,
        max_completion_length=4, gradient_checkpointing=False, **COMMON,
    )  # fmt: skip
    path = str(demo.bundled_model())
    GRPOTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        reward_funcs=reward,
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM") if lora else None,
        callbacks=[save],
    ).train()


def answers(count: int) -> list[dict[str, str]]:
    """The task's questions and right answers."""
    task = demo.reasoning_gym.create_dataset("chain_sum", size=count, seed=0, **demo.OPEN_ENDED["chain_sum"])
    return [{"prompt": entry["question"], "completion": f" {entry['answer']}"} for entry in task]


def sft(folder: Path, steps: int, save: SaveWeights, lr: float) -> None:
    config = SFTConfig(
        str(folder), max_steps=steps, learning_rate=lr, per_device_train_batch_size=8, gradient_checkpointing=False,
        **COMMON,
    )  # fmt: skip
    path = str(demo.bundled_model())
    SFTTrainer(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        args=config,
        train_dataset=datasets.Dataset.from_list(answers(2000)),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=16, lora_alpha=32, task_type="CAUSAL_LM"),
        callbacks=[save],
    ).train()


def rounded(value: Any) -> Any:
    """Four digits of every number: more are noise, and make the file long."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


SHOWN = ("skill", "tokens")  # of the tool's pictures, by the README beside the results

# name: how to train, steps, save every, dtype of the checkpoints
RUNS: dict[str, tuple[Callable[[Path, int, SaveWeights], None], int, int, torch.dtype]] = {
    "grpo-lora": (lambda *a: grpo(*a, lr=1e-4, lora=True), 52, 4, torch.float32),
    "sft-lora": (lambda *a: sft(*a, lr=1e-4), 28, 4, torch.float32),
    "grpo-full": (lambda *a: grpo(*a, lr=1e-5, lora=False, completions=16), 14, 1, torch.bfloat16),
}


def main(
    runs: Annotated[list[str] | None, typer.Argument(help=f"Among {', '.join(RUNS)}; default: all.")] = None,
    work: Annotated[Path, typer.Option(help="Folder for the checkpoints: 4 GB.")] = Path("/tmp/linear"),
    out: Annotated[Path, typer.Option(help="Folder for figures and pictures.")] = Path("benchmarks/results/linearity"),
) -> None:
    """Make the runs that are not there yet, and measure them."""
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    for name in runs or RUNS:
        train, steps, every, dtype = RUNS[name]
        folder = work / name
        if not (folder / "logs.json").exists():
            transformers.set_seed(0)
            save = SaveWeights(folder, every, dtype)
            train(folder, steps, save)
            tokenizer = AutoTokenizer.from_pretrained(demo.bundled_model())
            for checkpoint in folder.glob("checkpoint-*"):
                tokenizer.save_pretrained(checkpoint)
            (folder / "logs.json").write_text(json.dumps(save.logs))
        prompts = work / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(row) + "\n" for row in answers(2016)[2000:]))
        (out / name).mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "extraopt.tools.cli",
            "linearity",
            str(folder),
            "--prompts",
            str(prompts),
            "--json",
        ]
        shown = subprocess.run([*command, "--plots", str(out / name)], check=True, stdout=subprocess.PIPE, text=True)
        report = json.loads(shown.stdout)
        del report["tensors"]  # hundreds
        report["logs"] = json.loads((folder / "logs.json").read_text())
        for picture in (out / name).glob("*.png"):
            if picture.stem in SHOWN:
                Image.open(picture).convert("RGB").quantize(
                    128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE
                ).save(picture, optimize=True)
            else:
                picture.unlink()
        (out / name / "report.json").write_text(json.dumps(rounded(report)) + "\n")
        print(f"{name}\n\n" + "\n".join(report["verdict"]) + "\n", flush=True)


if __name__ == "__main__":
    typer.run(main)
