"""The comparison: every optimizer on every task, over learning rates and seeds.

    python benchmarks/rlvr/compare.py --quick                                  # a look, under 5 minutes
    python benchmarks/rlvr/compare.py --json benchmarks/results/rlvr.json      # all of it: hours

The grid, the seeds, the budget of steps and what counts as collapsed are fixed below. No run is stopped early. Finished
runs are kept in FILE.partial as they end, so that a comparison that was cut off goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lab
import optimizers
import torch
from rich.progress import Progress

SEEDS = (0, 1, 2, 3, 4)
EVALUATE_EVERY = 10
LAB = hashlib.sha256(Path(lab.__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:16]
COLLAPSED = 0.5  # a run has collapsed if it ends below this fraction of the accuracy before training

OURS = ("AdamW", "ExtraAdam")
PEERS = (
    "RL-Extra (20,100) kept",
    "RL-Extra (20,100) reset",
    "RL-Extra (100,100) kept",
    "RL-Extra (100,100) reset",
    "Lookahead",
    "Schedule-free",
    "Outer Nesterov (0.7,0.9)",
    "Outer Nesterov (0.7,0.5)",
    "EMA",
)
LONG = ("RL-Extra (300,300) kept", "RL-Extra (300,300) reset")


@dataclass(frozen=True)
class Cell:
    """One task and algorithm: AdamW and ExtraAdam run at every `lrs`, other optimizers at every `peer_lrs`."""

    task: str
    algorithm: str
    rollouts: int
    tuning: str
    steps: int
    lrs: tuple[float, ...]
    peers: tuple[str, ...]
    peer_lrs: tuple[float, ...]


CELLS = (
    Cell("addition", "GRPO", 512, "full", 240, (3e-5, 1e-4, 3e-4, 1e-3), PEERS, (1e-4, 3e-4)),
    Cell("addition", "GRPO", 64, "full", 400, (1e-5, 3e-5, 1e-4, 3e-4), PEERS + LONG, (3e-5, 1e-4)),
    Cell("addition", "GRPO", 512, "LoRA", 240, (3e-4, 1e-3, 3e-3), PEERS[:1] + PEERS[6:7], (1e-3,)),
    Cell("addition", "REINFORCE++", 512, "full", 240, (3e-5, 1e-4, 3e-4), PEERS[:1] + PEERS[6:7], (3e-4,)),
    Cell("addition", "GSPO", 512, "full", 240, (3e-5, 1e-4, 3e-4), PEERS[:1] + PEERS[6:7], (3e-4,)),
    Cell("spell_backward", "GRPO", 512, "full", 240, (3e-5, 1e-4, 3e-4), PEERS, (3e-4,)),
    Cell("near_zero", "GRPO", 512, "full", 240, (3e-5, 1e-4, 3e-4), PEERS, (3e-4,)),
    Cell("supervised", "cross-entropy", 64, "full", 400, (1e-4, 3e-4, 1e-3, 3e-3), PEERS + LONG, (1e-3,)),
)
QUICK = (
    Cell("addition", "GRPO", 64, "full", 100, (1e-4,), ("Outer Nesterov (0.7,0.9)", "RL-Extra (20,100) kept"), (1e-4,)),
    Cell("supervised", "cross-entropy", 64, "full", 100, (1e-3,), (), ()),
)


def weak_policy(task_name: str, seed: int) -> tuple[lab.Task, lab.Policy]:
    """The task and its policy before training; pre-training is done once for each task and seed."""
    task = lab.TASKS[task_name](seed)
    same = "addition" if task_name == "supervised" else task_name
    kept = Path(tempfile.gettempdir()) / f"extraopt-rlvr-{os.getuid()}" / f"{same}-{seed}-{LAB}.pt"
    if kept.exists():
        policy = lab.Policy(task.prompts.shape[1] + task.answers.shape[1])
        policy.load_state_dict(torch.load(kept, weights_only=True))
        return task, policy
    policy = lab.pretrain(task, seed)
    kept.parent.mkdir(exist_ok=True)
    beside = kept.with_suffix(f".{os.getpid()}")
    torch.save(policy.state_dict(), beside)
    beside.replace(kept)
    return task, policy


def run(cell: Cell, name: str, lr: float, seed: int) -> dict[str, Any]:
    """One run, as a row of the results."""
    torch.set_num_threads(1)
    task, policy = weak_policy(cell.task, seed)
    if cell.tuning == "LoRA":
        lab.add_lora(policy, seed)
    trained = optimizers.build(name, policy, lr)
    generator = torch.Generator().manual_seed(5000 + seed)
    curve = [[0, policy.accuracy(task)]]
    jumps: list[list[float]] = []
    wall, cpu, step = time.perf_counter(), time.process_time(), 0
    while step < cell.steps:
        for loss in lab.losses(policy, task, cell.algorithm, cell.rollouts, generator):
            trained.optimizer.zero_grad()
            loss().backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
            trained.step()
            step += 1
            report = getattr(trained.optimizer, "last_jump", None)
            if report is not None and report.step == step:
                jumps.append([step, round(report.coherence, 3), round(report.gate, 3)])
        if step % EVALUATE_EVERY == 0:
            with trained.kept() as model:
                curve.append([step, model.accuracy(task)])
    return {
        "optimizer": name,
        "task": cell.task,
        "algorithm": cell.algorithm,
        "settings": {"rollouts": cell.rollouts, "tuning": cell.tuning, "steps": cell.steps},
        "lr": lr,
        "seed": seed,
        "curve": [[s, round(a, 4)] for s, a in curve],
        "collapsed": curve[-1][1] < COLLAPSED * curve[0][1],
        "seconds": round(time.perf_counter() - wall, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "jumps": jumps,
    }


def runs(cells: tuple[Cell, ...], seeds: tuple[int, ...]) -> list[tuple[Cell, str, float, int]]:
    """All runs of `cells`, seed by seed."""
    return [
        (cell, name, lr, seed)
        for seed in seeds
        for cell in cells
        for names, lrs in ((OURS, cell.lrs), (cell.peers, cell.peer_lrs))
        for lr in lrs
        for name in names
    ]


def _key(cell: Cell, name: str, lr: float, seed: int) -> str:
    place = {k: v for k, v in asdict(cell).items() if k in ("task", "algorithm", "rollouts", "tuning", "steps")}
    return json.dumps([place, name, lr, seed])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short cells, one seed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    todo = runs(QUICK, SEEDS[:1]) if args.quick else runs(CELLS, SEEDS)
    partial = args.json.with_suffix(".partial") if args.json else None
    rows = {}
    if partial and partial.exists():
        rows = dict(json.loads(line) for line in partial.read_text().splitlines())
    with ProcessPoolExecutor(args.workers) as pool, Progress() as progress:
        started = {pool.submit(run, *r): _key(*r) for r in todo if _key(*r) not in rows}
        bar = progress.add_task("runs", total=len(todo), completed=len(todo) - len(started))
        for future in as_completed(started):
            row = rows[started[future]] = future.result()
            if partial:
                with partial.open("a") as f:
                    f.write(json.dumps([started[future], row]) + "\n")
            progress.advance(bar)
            what = f"{row['task']} {row['algorithm']} {row['settings']['rollouts']} {row['settings']['tuning']}"
            progress.console.print(
                f"{what:40} lr {row['lr']:<8g} seed {row['seed']} {row['optimizer']:26} "
                f"{row['curve'][0][1]:.3f} -> {row['curve'][-1][1]:.3f}"
            )
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        ordered = [rows[_key(*r)] for r in todo]
        args.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in ordered) + "\n]\n")
        partial.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
