"""The `extraopt` command: a thin layer over extraopt.tools.checkpoints and extraopt.tools.decoding.

Each command imports what it needs when it runs, so that `--help` answers at once. Results go to stdout (with `--json`
nothing else does), progress and errors to stderr. Bad input is one line on stderr and exit code 2.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from .checkpoints import CheckpointError, Extrapolation, find_checkpoints

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Allow Python code from the checkpoint to run.")]

Fit = Literal["line", "ols"]
Lora = Literal["product", "factors"]


@app.callback()
def main() -> None:
    """Look at checkpoints and extrapolate them: https://arxiv.org/abs/2601.04537 as tools."""


@contextmanager
def progress(what: str) -> Iterator[Callable[[float, float], None]]:
    """A progress bar on stderr, if that is a terminal: call the result with (done, total).

    What libraries print to stdout meanwhile goes to stderr too, and out of the results.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        with redirect_stdout(sys.stderr):
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
    from .checkpoints.linearity import linearity as measure
    from .checkpoints.paths import Filter

    left_out: list[str] = []
    found = [checkpoint for path in paths for checkpoint in find_checkpoints(path, left_out)]
    for note in left_out:
        err.print(f"Note: {note}", soft_wrap=True, markup=False, highlight=False)
    keep = Filter(min_move, min_values)
    if prompts and not os.path.isfile(prompts):
        raise CheckpointError(f"--prompts {prompts}: no such file")
    draw = _pictures(plots, format) if plots else None
    with progress("weights") as bar:
        report = measure(found, sample=sample or None, keep=keep, seed=seed, progress=bar)
    if prompts:
        try:
            from .checkpoints.tokens import token_linearity
            from .generation import be_quiet
        except ImportError as error:
            raise CheckpointError(f"--prompts needs transformers: pip install 'extraopt[hf]' ({error})") from error

        be_quiet()
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


@app.command()
def extrapolate(
    checkpoints: Annotated[list[Path], typer.Argument(help="Checkpoints, earliest first; or the folder of a run.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New folder.")],
    alpha: Annotated[float | None, typer.Option(help="How far beyond the last: (1 + alpha) B - alpha A.")] = None,
    steps: Annotated[str | None, typer.Option(help="Step of each checkpoint, if their names do not tell.")] = None,
    to: Annotated[float | None, typer.Option(help="How far, as a step.")] = None,
    sweep: Annotated[str | None, typer.Option(help="Several alphas, such as 1,2,4,8: a model for each.")] = None,
    evaluate: Annotated[
        str | None, typer.Option("--eval", help="With --sweep: command with {dir} that prints a score last.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --eval: picture, .png or .svg. Default: in the output.")
    ] = None,
    fit: Annotated[Fit, typer.Option(help="A line through two, or least squares over more.")] = "line",
    average: Annotated[int, typer.Option(min=1, help="Average so many checkpoints in a row first.")] = 1,
    include: Annotated[list[str], typer.Option(help="Pattern of names to extrapolate, such as '*.mlp.*'.")] = [],  # noqa: B006
    exclude: Annotated[list[str], typer.Option(help="Pattern of names to leave as in the last checkpoint.")] = [],  # noqa: B006
    lora: Annotated[Lora, typer.Option(help="Adapters: extrapolate the product B A, or its factors.")] = "product",
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write the model that lies further along the line from earlier checkpoints to the last one."""
    from . import checkpoints as api

    options: dict[str, Any] = {"fit": fit, "average": average, "include": include, "exclude": exclude, "lora": lora}
    options |= {"steps": _numbers("--steps", steps) if steps else None, "trust_remote_code": trust_remote_code}
    if sweep is None:
        if evaluate or plot:
            raise CheckpointError("--eval and --plot go with --sweep.")
        with progress("extrapolate") as bar:
            result = api.extrapolate(checkpoints, output, alpha=alpha, to=to, progress=bar, **options)
        if as_json:
            print_json(result.as_dict())
        else:
            _tell(result)
        return
    if alpha is not None or to is not None:
        raise CheckpointError("--sweep says how far: leave --alpha and --to away.")
    alphas = _numbers("--sweep", sweep)
    score = _command_score(evaluate) if evaluate else None
    picture = plot or output / "sweep.png"
    if picture.suffix not in (".png", ".svg", ".pdf"):
        raise CheckpointError(f"--plot {picture}: give a name that ends in .png, .svg or .pdf")
    with progress("sweep") as bar:
        swept = api.sweep(checkpoints, output, alphas, score, progress=bar, **options)
    if score:
        from . import plots

        plots.sweep(swept.rows, picture)
    if as_json:
        print_json(swept.as_dict())
        return
    table = Table("alpha", "score", "folder")
    for row in swept.rows:
        table.add_row(f"{row['alpha']:g}", "" if row["score"] is None else f"{row['score']:.6g}", row["dir"])
    out.print(table)
    if swept.best:
        out.print(
            f"Best: alpha {swept.best['alpha']:g} with {swept.best['score']:.6g}, {swept.best['dir']}", soft_wrap=True
        )


def _tell(result: Extrapolation) -> None:
    """An extrapolation in words."""
    terms = " ".join(f"{weight:+.6g} * {path.name}" for path, weight in result.sum)
    lines = [f"W = {terms}, which is alpha = {result.alpha:.6g}"]
    lines.append(f"{result.extrapolated} tensors extrapolated, {len(result.copied)} copied from the last checkpoint.")
    if result.tied:
        lines.append("Tied by the model: " + "; ".join(" = ".join(group) for group in result.tied))
    if result.lora:
        kept = {"product": "B A, cut back to its rank", "factors": "A and B one by one"}[result.lora.written]
        lines.append(f"Written: {kept}. Of the jump in B A, the cut misses {result.lora.truncation:.3%},")
        lines.append(f"and A and B one by one miss {result.lora.cross_term:.3%} (the cross term).")
    lines += [f"Note: {note}" for note in result.notes]
    lines.append(f"{result.out}: {result.bytes / 1e6:,.1f} MB in {result.seconds:.1f} s")
    out.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


@app.command()
def generate(
    model: Annotated[str, typer.Argument(help="Later checkpoint: folder or hub id, or the folder of an adapter.")],
    alpha: Annotated[float, typer.Option(help="How far beyond it: (1 + alpha) logits_2 - alpha logits_1.")],
    earlier: Annotated[
        str | None, typer.Option(help="Earlier checkpoint. Default, for an adapter: the model under it.")
    ] = None,
    prompt: Annotated[list[str], typer.Option(help="A prompt; may be given several times.")] = [],  # noqa: B006
    prompts: Annotated[Path | None, typer.Option(help="A prompt a line; .jsonl: with prompt or messages.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="For each prompt, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0: take the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from the likeliest of this probability.")] = 1.0,
    num_beams: Annotated[int, typer.Option(min=1, help="More than 1: beam search.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 8,
    chat: Annotated[
        bool | None, typer.Option("--chat/--no-chat", help="Use the chat template. Default: if there is one.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Model under the adapters, instead of the one they name.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to run. Default: the GPU, if there is one.")] = None,
    as_json: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write text with the logits that lie further along the line from an earlier checkpoint to a later one."""
    try:
        from . import generation as api
    except ImportError as error:
        raise CheckpointError(f"generate needs transformers: pip install 'extraopt[hf]' ({error})") from error

    api.be_quiet()
    asked: list[Any] = [*prompt, *(api.read_prompts(prompts) if prompts else [])]
    if not asked:
        raise CheckpointError("nothing to answer: give --prompt or --prompts")
    with progress("loading"):
        loaded = api.load_pair(model, earlier, alpha, base=base, device=device, trust_remote_code=trust_remote_code)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    settings |= {"num_beams": num_beams, "seed": seed, "batch_size": batch_size, "chat": chat}
    with progress("tokens") as bar:
        results = api.complete(*loaded[:2], asked, loaded[2], progress=bar, **settings)
    if as_json:
        print_json({"model": model, "earlier": earlier, "alpha": alpha, **settings, "results": results})
        return
    for row in results:
        asked_for = row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][-1]["content"]
        out.print(asked_for, style="dim", markup=False, highlight=False)
        out.print(row["completion"] + "\n", markup=False, highlight=False)


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="A run's folder with trainer_state.json or log.jsonl, or such a file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Page. Default: extraopt-report.html in the folder.")
    ] = None,
    steps_ahead: Annotated[
        float | None, typer.Option(min=0, help="N, if no checkpoint's optimizer.pt tells extra_steps.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make one HTML page from a run's logs: how far did ExtraAdam jump, how straight was the path, what came of it?"""
    from .report import read_run, summarize

    try:
        from . import page
    except ImportError as error:
        raise CheckpointError(f"report needs matplotlib: pip install matplotlib ({error})") from error
    file = output or (path if os.path.isdir(path) else path.parent) / "extraopt-report.html"
    if file.suffix not in (".html", ".htm"):
        raise CheckpointError(f"--output {file}: give a name that ends in .html")
    run = read_run(path, ahead=steps_ahead)
    summary = summarize(run)
    page.write(page.html(run, summary), file)
    if as_json:
        print_json({**summary, "page": str(file)})
        return
    lines = [*summary["verdict"], *(f"Warning: {words}" for words in summary["warnings"])]
    lines += [*(f"Note: {words}" for words in summary["notes"]), str(file)]
    out.print("\n".join(lines), soft_wrap=True, markup=False, highlight=False)


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise CheckpointError(f"{option} {text}: give numbers such as 300,600") from None


def _command_score(command: str) -> Callable[[Path], float]:
    """Scores a model by the last number that a command prints. No shell is involved."""
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise CheckpointError(f"--eval {command!r}: {error}") from error
    if not any("{dir}" in word for word in words):
        raise CheckpointError(f"--eval {command!r} has no {{dir}}, which stands for the model's folder.")

    def score(folder: Path) -> float:
        filled = [word.replace("{dir}", str(folder)) for word in words]
        try:
            done = subprocess.run(filled, capture_output=True, text=True, errors="replace")
        except (OSError, ValueError) as error:
            raise CheckpointError(f"--eval: {words[0]} can not be run: {error}") from error
        numbers = re.findall(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?", done.stdout)
        if done.returncode or not numbers:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
            raise CheckpointError(f"--eval on {folder} gave no score (exit code {done.returncode}): {said}")
        return float(numbers[-1])

    return score


@app.command()
def env() -> None:
    """Print what a bug report needs: versions, platform, GPUs, and the kernels that are in use."""
    from .environment import print_environment

    print_environment()


def join_steps(arguments: list[str]) -> list[str]:
    """`--steps 300 600` as `--steps 300,600`: options of click take a fixed number of words."""
    joined: list[str] = []
    for argument in arguments:
        number = argument.replace(".", "", 1).isdigit()
        if number and len(joined) > 1 and joined[-2] == "--steps":
            joined[-1] += f",{argument}"
        else:
            joined.append(argument)
    return joined


def run() -> None:
    """Run the command line; bad input ends in one line on stderr and exit code 2."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an exception, so that unfinished folders go away
    try:
        app(join_steps(sys.argv[1:]))
    except CheckpointError as error:
        print(f"extraopt: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run()
