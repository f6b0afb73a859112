"""The `extraopt` command: a thin layer over extraopt.checkpoints and extraopt.decoding.

Each command imports what it needs when it runs, so that `--help` answers at once. Results go to stdout (with `--json`
nothing else does), progress and errors to stderr. Bad input is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .checkpoints import CheckpointError, find_checkpoints

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow Python code from the checkpoint to run.")]


@app.callback()
def main() -> None:
    """Look at checkpoints and extrapolate them: https://arxiv.org/abs/2601.04537 as tools."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[float, float], None]]:
    """A progress bar on stderr, if that is a terminal: call the result with (done, total)."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def print_json(result: dict[str, Any]) -> None:
    """The whole result of a command, for scripts."""
    print(json.dumps(result, indent=1, default=str))


@app.command()
def linearity(
    paths: Annotated[list[Path], typer.Argument(help="A run's folder with its checkpoints, or three checkpoints.")],
    prompts: Annotated[
        Path | None, typer.Option(help="JSONL with prompt and response, or messages: measure log-probabilities too.")
    ] = None,
    sample: Annotated[int, typer.Option(min=0, help="Weights drawn from each tensor; 0: all.")] = 20_000,
    min_move: Annotated[float, typer.Option(min=0, help="The filter keeps weights that moved by more.")] = 1e-4,
    min_values: Annotated[int, typer.Option(min=0, help="And that took so many distinct stored values.")] = 4,
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures; made if it is not there.")] = None,
    format: Annotated[str, typer.Option(help="Of the pictures: png, svg or pdf.")] = "png",
    base: Annotated[str | None, typer.Option(help="Model under the adapters, instead of the one they name.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Responses scored at once.")] = 8,
    device: Annotated[str | None, typer.Option(help="Where to score them. Default: the GPU, if there is one.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sample and of the random walks.")] = 0,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """How straight was this run, how straight would noise look, and how far could one have jumped?"""
    from .checkpoints.linearity import Filter
    from .checkpoints.linearity import linearity as measure

    found = [checkpoint for path in paths for checkpoint in find_checkpoints(path)]
    keep = Filter(min_move, min_values)
    draw = _pictures(plots, format) if plots else None
    with progress("weights") as bar:
        report = measure(found, sample=sample or None, keep=keep, seed=seed, progress=bar)
    if prompts:
        from .checkpoints.tokens import token_linearity

        with progress("log-probabilities") as bar:
            report["tokens"] = token_linearity(
                found, prompts, base=base, batch_size=batch_size, device=device, trust_remote_code=trust_remote_code,
                progress=bar,
            )  # fmt: skip
    if draw:
        draw(report)
    if as_json:
        print_json(report)
    else:
        from .checkpoints.tables import linearity_tables

        out.print(linearity_tables(report))


def _pictures(folder: Path, format: str) -> Callable[[dict[str, Any]], None]:
    """How to draw a linearity report into a folder; fails before the work is done, not after."""
    if format not in ("png", "svg", "pdf"):
        raise CheckpointError(f"--format {format}: give png, svg or pdf")
    try:
        from . import plots
    except ImportError as error:
        raise CheckpointError(f"--plots needs matplotlib: pip install matplotlib ({error})") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: no folder for pictures ({error})") from error

    def draw(report: dict[str, Any]) -> None:
        plots.r2_histogram(report, folder / f"r2.{format}")
        plots.skill(report, folder / f"skill.{format}")
        plots.layer_map(report, folder / f"layers.{format}")
        if "tokens" in report:
            plots.r2_histogram(report["tokens"], folder / f"tokens-r2.{format}", what="tokens")
            plots.token_curves(report["tokens"], folder / f"tokens.{format}")

    return draw


def run() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    try:
        app()
    except CheckpointError as error:
        print(f"extraopt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
