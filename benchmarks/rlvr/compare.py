"""The comparison: every optimizer on every task, over learning rates and seeds.

    python benchmarks/rlvr/compare.py --quick                                  # a look, under 5 minutes
    python benchmarks/rlvr/compare.py --json benchmarks/results/rlvr.json      # all of it: hours
    python benchmarks/rlvr/compare.py --slow --json benchmarks/results/rlvr-slow.json
    python benchmarks/rlvr/compare.py --held-out --json benchmarks/results/rlvr-held-out.json
    python benchmarks/rlvr/compare.py --ablate --json benchmarks/results/rlvr-ablations.json

The grid, the seeds, the budget of steps and what counts as collapsed are fixed below. No run is stopped early. Each run
is written to FILE as it ends, and runs that FILE has from the same code are not repeated: a comparison that was cut off
goes on where it was, and after a change of ExtraAdam only its own runs are made anew. All rows of a file have to be
made on one kind of CPU, since seeds begin from other policies on another: it says so where they were not.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import lab
import optimizers
import torch
from rich.progress import Progress

SEEDS = (0, 1, 2, 3, 4)
HELD_OUT = (5, 6)  # of policies that had no part in choosing the defaults
EVALUATE_EVERY = 10
Row = dict[str, Any]
COLLAPSED = 0.5  # a run has collapsed if it ends below this fraction of the accuracy before training


def _hash(path: Path) -> str:
    """Of what a source does: neither comments nor docstrings nor line breaks."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body.pop(0)
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:12]


SAME_RUNS = {"431b3a860325": "a1c2fe42f2bb"}  # versions of lab.py whose runs are those of an older one, bit for bit
LAB = SAME_RUNS.get(_hash(Path(lab.__file__)), _hash(Path(lab.__file__)))
RULE = 11  # raise it when the rule or its defaults change: then ExtraAdam's runs are made anew


def code(name: str) -> str:
    """The version of the code that a run of this optimizer depends on, as far as it is ours."""
    return f"{LAB} {RULE}" if name.startswith("ExtraAdam") else LAB


OURS = ("AdamW", "ExtraAdam")
STRONG = (
    "Outer Nesterov (0.7,0.9)",
    "RL-Extra (20,100) kept",
    "RL-Extra (20,100) reset",
    "Lookahead",
    "Schedule-free",
)
MORE = ("RL-Extra (100,100) kept", "RL-Extra (100,100) reset", "Outer Nesterov (0.7,0.5)", "EMA")
LONG = ("RL-Extra (300,300) kept", "RL-Extra (300,300) reset")
NEWER = ("AdEMAMix", "KL-adapted")


@dataclass(frozen=True)
class Cell:
    """AdamW and ExtraAdam run at every `lrs`, strong peers at every `peer_lrs`, other peers at the last of them."""

    task: str
    algorithm: str
    rollouts: int
    tuning: str
    steps: int
    lrs: tuple[float, ...]
    peers: tuple[str, ...]
    peer_lrs: tuple[float, ...]


Run = tuple[Cell, str, float, int]
CELLS = (
    Cell(
        "addition",
        "GRPO",
        512,
        "full",
        240,
        (3e-5, 1e-4, 3e-4, 1e-3),
        STRONG + MORE + NEWER + ("EMA-Nesterov (0.99,0.5,240)",),
        (1e-4, 3e-4),
    ),
    Cell(
        "addition",
        "GRPO",
        64,
        "full",
        400,
        (1e-5, 3e-5, 1e-4, 3e-4),
        STRONG + MORE + LONG + NEWER + ("EMA-Nesterov (0.99,0.5,400)",),
        (3e-5, 1e-4),
    ),
    Cell("addition", "GRPO", 512, "LoRA", 160, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), STRONG[:2], (1e-3,)),
    Cell("addition", "REINFORCE++", 512, "full", 160, (1e-4, 3e-4, 1e-3), STRONG[:2], (3e-4,)),
    Cell("addition", "GSPO", 512, "full", 160, (3e-5, 1e-4, 3e-4), STRONG[:2], (3e-4,)),
    Cell("spell_backward", "GRPO", 512, "full", 160, (3e-5, 1e-4, 3e-4), STRONG, (3e-4,)),
    Cell("near_zero", "GRPO", 512, "full", 160, (1e-4, 3e-4, 1e-3), STRONG, (3e-4,)),
    Cell("supervised", "cross-entropy", 64, "full", 400, (1e-4, 3e-4, 1e-3, 3e-3), STRONG + MORE + LONG, (3e-4, 1e-3)),
)
# the rule with one thing changed; what stands before "=" with a dot is a constant of the package
ABLATIONS = (
    "ExtraAdam",
    "ExtraAdam extra_gate=None",
    "ExtraAdam gate.RETREAT=0",
    "ExtraAdam gate.NEWEST=0",
    "ExtraAdam extra_beta=0.8",
    "ExtraAdam extra_beta=0.95",
    "ExtraAdam extra_every=10",
    "ExtraAdam extra_every=20",
    "ExtraAdam extra_steps=100",
    "ExtraAdam extra_steps=1000",
    "ExtraAdam trust.OPEN=0",
    "ExtraAdam trust.OPEN=0.5",
    "ExtraAdam trust.GROWTH=4",
    "ExtraAdam trust.SHORTEST=1",
    "ExtraAdam trust.PLAUSIBLE=0.01",
    "ExtraAdam extra_kl=0.005",
    "ExtraAdam extra_kl=0.05",
    "ExtraAdam extra_fall=0.2",
    "ExtraAdam extra_fall=0.8",
    "ExtraAdam extra_fall=1.6",
    "ExtraAdam extra_fall=10",
    "ExtraAdam trust.COUNTED=0 extra_fall=0.1",
    "ExtraAdam trust.COUNTED=0 extra_fall=0.3",
    "ExtraAdam extra_watch=False",
)
ABLATED = (
    Cell("addition", "GRPO", 64, "full", 400, (), ABLATIONS, (1e-5, 3e-4)),
    Cell("addition", "GRPO", 512, "full", 240, (), ABLATIONS, (3e-5, 3e-4)),
)
# where RLVR is done: learning rates at which AdamW is far from its end when even a long budget is used up
SLOW = (
    Cell("addition", "GRPO", 64, "full", 1500, (3e-6, 1e-5), (), ()),
    Cell("addition", "GRPO", 512, "full", 1500, (1e-5, 3e-5), (), ()),
)
QUICK = (
    Cell("addition", "GRPO", 64, "full", 100, (1e-4,), ("Outer Nesterov (0.7,0.9)", "RL-Extra (20,100) kept"), (1e-4,)),
    Cell("supervised", "cross-entropy", 64, "full", 100, (1e-3,), (), ()),
)


def weak_policy(task_name: str, seed: int) -> tuple[lab.Task, lab.Policy]:
    """The task and its policy before training; pre-training is done once for each task and seed."""
    task = lab.TASKS[task_name](seed)
    same = "addition" if task_name == "supervised" else task_name
    kept = Path(tempfile.gettempdir()) / f"extraopt-rlvr-{os.getuid()}" / f"{same}-{seed}-{LAB}-{torch.__version__}.pt"
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


def run(
    cell: Cell,
    name: str,
    lr: float,
    seed: int,
    build: Callable[[str, lab.Policy, float], optimizers.Trained] = optimizers.build,
    schedule: str = "",
) -> dict[str, Any]:
    """One run, as a row of the results."""
    torch.set_num_threads(1)
    task, policy = weak_policy(cell.task, seed)
    if cell.tuning == "LoRA":
        lab.add_lora(policy, seed)
    trained = build(name, policy, lr)
    fades = {"": lambda step: 1.0, "linear": lambda step: 1 - step / cell.steps}[schedule]
    generator = torch.Generator().manual_seed(5000 + seed)
    curve = [[0, policy.accuracy(task)]]
    jumps: list[list[float]] = []
    wall, cpu, step = time.perf_counter(), time.process_time(), 0
    while step < cell.steps:
        for loss, _ in lab.losses(policy, task, cell.algorithm, cell.rollouts, generator):
            trained.optimizer.zero_grad()
            loss().backward()
            for group in trained.optimizer.param_groups if schedule else ():
                group["lr"] = lr * fades(step)
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
        "code": code(name),
    }


def runs(cells: tuple[Cell, ...], seeds: tuple[int, ...]) -> list[Run]:
    """All runs of `cells`: AdamW and ExtraAdam, seed by seed, and then the peers, seed by seed."""
    ours = [(cell, name, lr) for cell in cells for lr in cell.lrs for name in OURS]
    theirs = [
        (cell, name, lr)
        for cell in cells
        for name in cell.peers
        for lr in (cell.peer_lrs if name in STRONG + ABLATIONS else cell.peer_lrs[-1:])
    ]
    return [(*run, seed) for group in (ours, theirs) for seed in seeds for run in group]


def _key(cell: Cell, name: str, lr: float, seed: int) -> str:
    """What makes a run the same as one in a file: the grid's entry, and the code that it went through."""
    place = {k: v for k, v in asdict(cell).items() if k in ("task", "algorithm", "rollouts", "tuning", "steps")}
    return json.dumps([place, name, lr, seed, code(name)])


def _row_key(row: Row) -> str:
    place = {"task": row["task"], "algorithm": row["algorithm"]} | row["settings"]
    return json.dumps([place, row["optimizer"], row["lr"], row["seed"], row["code"]])


def write(rows: list[Row], path: Path) -> None:
    """One row a line. The file is whole at any time.

    Raises:
        ValueError: runs of one seed began from different policies. Kinds of CPUs round differently, and pre-training
            ends elsewhere: such runs say nothing about each other.
    """
    starts: dict[tuple[str, int], float] = {}
    for row in rows:
        task, seed, start = row.get("task", "addition"), row["seed"], row["curve"][0][1]
        if starts.setdefault((task, seed), start) != start:
            raise ValueError(
                f"Runs of {task}, seed {seed}, began from accuracies {starts[task, seed]} and {start}: they were made "
                f"on CPUs that round differently. Write to another file than {path}, or make all of its rows here."
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    beside.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    beside.replace(path)


@contextmanager
def workers(count: int) -> Iterator[ProcessPoolExecutor]:
    """Processes for runs. After an error those that have not begun are dropped, else it would show hours later."""
    with ProcessPoolExecutor(count) as pool:
        try:
            yield pool
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short cells, one seed")
    parser.add_argument("--slow", action="store_true", help="long budgets at a tenth and a thirtieth of the best lr")
    parser.add_argument("--held-out", action="store_true", help="all cells without peers, on two new seeds")
    parser.add_argument("--ablate", action="store_true", help="the rule with one thing changed, on four cells")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows go")
    parser.add_argument("--optimizers", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    args = parser.parse_args()
    cells, seeds = (QUICK, SEEDS[:1]) if args.quick else (CELLS, SEEDS)
    if args.slow or args.ablate:
        cells, seeds = SLOW if args.slow else ABLATED, SEEDS[:3]
    if args.held_out:
        cells, seeds = tuple(replace(cell, peers=()) for cell in cells), HELD_OUT
    grid = {_key(*r): r for r in runs(cells, seeds)}
    found = json.loads(args.json.read_text()) if args.json and args.json.exists() else []
    done = {key: row for row in found if (key := _row_key(row)) in grid}
    todo = {key: r for key, r in grid.items() if not args.optimizers or r[1] in args.optimizers}
    with workers(args.workers) as pool, Progress() as progress:
        started = {pool.submit(run, *r): key for key, r in todo.items() if key not in done}
        bar = progress.add_task("runs", total=len(todo), completed=len(todo) - len(started))
        for future in as_completed(started):
            row = done[started[future]] = future.result()
            if args.json:
                write([done[key] for key in grid if key in done], args.json)
            progress.advance(bar)
            what = f"{row['task']} {row['algorithm']} {row['settings']['rollouts']} {row['settings']['tuning']}"
            progress.console.print(
                f"{what:40} lr {row['lr']:<8g} seed {row['seed']} {row['optimizer']:26} "
                f"{row['curve'][0][1]:.3f} -> {row['curve'][-1][1]:.3f}"
            )


if __name__ == "__main__":
    main()
