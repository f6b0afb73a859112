"""Training runs that are killed with SIGKILL at random moments and begun again, until they end by themselves.

    python tests/integrations/_killed.py FOLDER SEED trainer=10 dcp=10

Everything is imported once; each life of a run (see `_lives.py`) is forked from there. Prints a line of JSON for each
life that was killed, and one for each kind of run at the end.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

import torch
from _lives import EVERY, FINAL, INCOMPLETE, JUMPING, JUMPS, LIVES, RETREATS, SAVING, STEP, STEPS, Plan, shared
from helpers import assert_same

WORST = 120.0  # seconds after which a life hangs


@dataclass
class Record:
    kind: str
    kills: int = 0
    kills_in_save: int = 0
    kills_near_jump: int = 0  # less than a step away from the end of a cycle, on either side
    incomplete_checkpoints: int = 0
    finished_runs: int = 0
    equal_runs: int = 0
    jumps: int = 0  # of tensors, in the run that nobody disturbs
    retreats: int = 0
    seconds: float = 0.0
    differences: list[str] = field(default_factory=list)


def fork(work: Callable[[], None], group: int) -> int:
    """A child in this process group; 0: in one of its own."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, group)
        work()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def live(kind: str, folder: Path, plan: Plan) -> bool:
    """One life; whether it was killed. Any other end than that or the run's is an error."""
    life, ranks = LIVES[kind]
    shared[:] = bytes(len(shared))
    begun, pids = time.monotonic(), []
    for rank in range(ranks):
        pids.append(fork(lambda rank=rank: life(folder, rank, plan), pids[0] if pids else 0))
        os.setpgid(pids[-1], pids[0])  # on both sides, so that it holds whoever comes first
    codes: list[int] = []
    for pid in pids:
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() - begun > min(plan.delay, WORST):
                for other in pids[len(codes) :]:
                    os.kill(other, signal.SIGKILL)
            time.sleep(0.001)
        codes.append(os.waitstatus_to_exitcode(ended[1]))
    if time.monotonic() - begun > WORST or not set(codes) <= {0, -signal.SIGKILL}:
        raise RuntimeError(f"a life of {kind} ended with {codes} after {time.monotonic() - begun:.0f} s: {plan}")
    return any(codes)


def draw(rng: random.Random, kind: str, typical: float, first: bool) -> Plan:
    """The first kill falls between the last save and the end; half of the others anywhere in a life, the rest in
    mid-save and right before or after a jump."""
    if first:
        return Plan(point="end", nth=1)
    point = rng.choice(["", "", "save", "jump"])
    if not point:
        return Plan(delay=rng.uniform(0, typical))
    nth = rng.randint(1, 40 if point == "save" else 2 * STEPS // EVERY)
    return Plan(point=point, nth=nth, rank=rng.randrange(LIVES[kind][1]))


def campaign(kind: str, kills: int, rng: random.Random, folder: Path) -> Record:
    """So many kills, over as many runs as it takes; each run is then left to end and compared."""
    record, begun = Record(kind), time.monotonic()
    (folder / "undisturbed").mkdir(parents=True)
    live(kind, folder / "undisturbed", Plan())
    typical = time.monotonic() - begun
    record.jumps, record.retreats = shared[JUMPS], shared[RETREATS]
    wanted = torch.load(folder / "undisturbed" / FINAL, weights_only=True)
    while record.kills < kills:
        run = folder / f"run-{record.finished_runs}"
        run.mkdir()
        killed = True
        while killed:
            plan = draw(rng, kind, typical, not record.kills) if record.kills < kills else Plan()
            killed = live(kind, run, plan)
            record.incomplete_checkpoints += shared[INCOMPLETE]
            if killed:
                step, near = shared[STEP], shared[JUMPING] or (shared[STEP] % EVERY in (0, EVERY - 1) and shared[STEP])
                record.kills += 1
                record.kills_in_save += shared[SAVING]
                record.kills_near_jump += bool(near)
                life = {"kind": kind, "step": step, "in_save": bool(shared[SAVING]), "near_jump": bool(near)}
                print(json.dumps({**life, "by": plan.point or "clock"}), flush=True)
        record.finished_runs += 1
        try:
            assert_same(torch.load(run / FINAL, weights_only=True), wanted, kind)
            record.equal_runs += 1
        except AssertionError as error:
            record.differences.append(str(error))
        shutil.rmtree(run)
    record.seconds = time.monotonic() - begun
    return record


def main(folder: str, seed: str, *wanted: str) -> None:
    rng = random.Random(int(seed))
    for kind, kills in (word.split("=") for word in wanted):
        record = campaign(kind, int(kills), rng, Path(folder) / kind)
        print(json.dumps(vars(record)), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
