"""What is lost when training is killed: SIGKILL at random moments, resume, compare the end with an undisturbed run.

Two kinds of run, both on a CPU: transformers' Trainer, and torch.distributed.checkpoint with FSDP2 on two ranks. Half
of the kills fall anywhere in a process's life, half in mid-save and right before or after a jump
(`tests/integrations/_lives.py`).

    python benchmarks/faults.py [--kills 200] [--json benchmarks/results/faults.json]
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from extraopt import __version__

SCRIPT = Path(__file__).resolve().parents[1] / "tests" / "integrations" / "_killed.py"
KINDS = ["trainer", "dcp"]
COLUMNS = {
    "kind": "run",
    "kills": "kills",
    "kills_in_save": "in mid-save",
    "kills_near_jump": "within a step of a jump",
    "incomplete_checkpoints": "incomplete checkpoints",
    "finished_runs": "finished runs",
    "equal_runs": "bit-equal runs",
    "seconds": "seconds",
}


def run(kills: int, seed: int) -> list[dict[str, Any]]:
    """The records of all kinds."""
    records = []
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        command = [sys.executable, str(SCRIPT), folder, str(seed), *(f"{kind}={kills // len(KINDS)}" for kind in KINDS)]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        with (
            Progress(console=Console(stderr=True)) as bar,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env) as process,
        ):
            task = bar.add_task("killing", total=kills // len(KINDS) * len(KINDS))
            for line in process.stdout or ():
                if not line.startswith("{"):
                    continue
                if "finished_runs" in (entry := json.loads(line)):
                    records.append(entry)
                else:
                    bar.advance(task)
        if process.returncode:
            errors.seek(0)
            sys.exit(errors.read()[-4000:])
    return records


def main(
    kills: Annotated[int, typer.Option(min=2, help="In total; half of them for each kind of run.")] = 200,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the records here.")] = None,
) -> None:
    """Kill training runs, let them resume, and count those that end as they should."""
    records = run(kills, seed)
    table = Table(title=f"ExtraAdam {__version__}, torch {torch.__version__}, seed {seed}", box=box.MARKDOWN)
    for title in COLUMNS.values():
        table.add_column(title, justify="left" if title == "run" else "right")
    for record in records:
        record["seconds"] = round(record["seconds"], 1)
        table.add_row(*(str(record[key]) for key in COLUMNS))
    Console(width=140).print(table)
    for record in records:
        for difference in record["differences"]:
            print(f"{record['kind']}: {difference}")
    if json_file is not None:
        about = {"extraopt": __version__, "torch": torch.__version__, "machine": platform.machine(), "seed": seed}
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps({**about, "records": records}, indent=1) + "\n")
    sys.exit(any(record["equal_runs"] < record["finished_runs"] for record in records))


if __name__ == "__main__":
    typer.run(main)
