"""Answers that a policy seldom samples: do AdamW and ExtraAdam find them?

    python benchmarks/rlvr/rare.py --json benchmarks/results/rare.json

Sums and differences of numbers below 30. The policy has seen most negative differences without their sign, so that it
gives their right answers in one to five samples of a hundred, by seed, and the others in a quarter to a half. GRPO,
groups of 8. Runs that FILE has are not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import compare
import lab
import optimizers
import torch
from rich.progress import Progress
from torch import Tensor

MINUS = lab.CODE["m"]  # before the second term, and as a sign
UNSIGNED = 0.85  # of the negative answers in the corpus
LR, STEPS, SEEDS = 3e-4, 400, range(5)
FOUND = 0.1  # accuracy on negative answers from which they count as found


def task(seed: int) -> lab.Task:
    terms = [(a, sign, b) for a in range(30) for b in range(30) for sign in "+m"]
    numbers = [a + b if sign == "+" else a - b for a, sign, b in terms]
    questions = [f"{a}{sign}{b}=" for a, sign, b in terms]
    return lab._encode(questions, [str(n).replace("-", "m") for n in numbers], 0.5, 500, seed)


def unsigned(answers: Tensor, generator: torch.Generator) -> Tensor:
    """`answers` [n, T], of whose negative ones a fraction `UNSIGNED` has lost the sign."""
    lost = (answers[:, 0] == MINUS) & (torch.rand(len(answers), generator=generator) < UNSIGNED)
    shifted = torch.nn.functional.pad(answers[:, 1:], (0, 1), value=lab.PAD)
    return torch.where(lost[:, None], shifted, answers)


def pretrain(of: lab.Task, seed: int, steps: int = 1500, rate: float = 3e-3) -> lab.Policy:
    """As `lab.pretrain`, from a corpus without most of the signs."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(1000 + seed)
    policy = lab.Policy(of.prompts.shape[1] + of.answers.shape[1])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        prompts, answers = of.batch(256, generator)
        answers = lab.corrupted(unsigned(answers, generator), of.wrong, generator)
        lab.supervised_loss(policy, prompts, answers).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return policy


@torch.no_grad()
def accuracies(policy: lab.Policy, of: lab.Task) -> tuple[float, float]:
    """Exact accuracy over the held-out prompts, and over those of them whose answer is negative."""
    prompts, answers = of.prompts[-of.held_out :], of.answers[-of.held_out :, None]
    logp, counts = policy.log_probs(prompts, answers)
    right = (logp * counts).sum((1, 2)).exp()
    return float(right.mean()), float(right[answers[:, 0, 0] == MINUS].mean())


def runs_of(seed: int) -> list[dict[str, Any]]:
    """All runs of a seed, from one policy."""
    torch.set_num_threads(1)
    of = task(seed)
    weak = pretrain(of, seed).state_dict()
    rows = []
    for rollouts in (64, 256):
        for name in compare.OURS:
            policy = lab.Policy(of.prompts.shape[1] + of.answers.shape[1])
            policy.load_state_dict(weak)
            trained = optimizers.build(name, policy, LR)
            generator = torch.Generator().manual_seed(5000 + seed)
            curve = [[0, *accuracies(policy, of)]]
            while curve[-1][0] < STEPS:
                for _ in range(compare.EVALUATE_EVERY // lab.STEPS_PER_GENERATION):
                    for loss, _ in lab.losses(policy, of, "GRPO", rollouts, generator):
                        trained.optimizer.zero_grad()
                        loss().backward()
                        trained.step()
                curve.append([curve[-1][0] + compare.EVALUATE_EVERY, *accuracies(policy, of)])
            curve = [[step, round(every, 4), round(rare, 4)] for step, every, rare in curve]
            rows.append({"optimizer": name, "rollouts": rollouts, "lr": LR, "seed": seed, "curve": curve})
    return rows


def found(row: dict[str, Any]) -> float:
    """The first step from which on negative answers are found."""
    return next((step for step, _, rare in row["curve"] if rare >= FOUND), float("inf"))


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| rollouts | optimizer | negative answers found at step | accuracy on them, last | on all, last |"]
    lines.append("|---|---|---|---|---|")
    for rollouts, name in sorted({(row["rollouts"], row["optimizer"]) for row in rows}):
        own = sorted((r for r in rows if (r["rollouts"], r["optimizer"]) == (rollouts, name)), key=lambda r: r["seed"])
        steps = ", ".join(f"{found(row):.0f}".replace("inf", "never") for row in own)
        ends = [statistics.median(row["curve"][-1][i] for row in own) for i in (2, 1)]
        lines.append(f"| {rollouts} | {name} | {steps} | {ends[0]:.2f} | {ends[1]:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    rows = json.loads(args.json.read_text()) if args.json.exists() else []
    todo = [seed for seed in SEEDS if all(row["seed"] != seed for row in rows)]
    with compare.workers(args.workers) as pool, Progress() as progress:
        bar = progress.add_task("seeds", total=len(todo))
        for future in as_completed([pool.submit(runs_of, seed) for seed in todo]):
            rows += future.result()
            compare.write(rows, args.json)
            progress.advance(bar)
    print(table(rows))


if __name__ == "__main__":
    main()
