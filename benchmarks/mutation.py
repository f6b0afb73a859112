"""Mutation testing: does a test fail for each small change of the code that decides where weights go?

    pip install cosmic-ray
    python benchmarks/mutation.py --json benchmarks/results/mutation.json             # hours; resumes
    python benchmarks/mutation.py --json FILE --modules extraopt/gate.py --sample 20  # a look

cosmic-ray makes the mutants: at each place of a module one of the changes that it knows (another operator, another
number, a condition negated, a loop that does not run), chosen by a seed. Mutants that differ in annotations alone are
left out. Each is tested in a copy of the repository, until the first test fails. Each result is written as it comes.
"""

from __future__ import annotations

import ast
import difflib
import json
import os
import random
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Annotated, Any

import typer
from rich.progress import Progress

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "extraopt/adam.py",
    "extraopt/wrap.py",
    "extraopt/extrapolation.py",
    "extraopt/mixin.py",
    "extraopt/schedule.py",
    "extraopt/sharding.py",
    "extraopt/state.py",
    "extraopt/gate.py",
    "extraopt/trust.py",
    "extraopt/positions.py",
    "extraopt/watch.py",
    "extraopt/undisturbed.py",
    "kernels/lists.py",
    "kernels/foreach.py",
    "kernels/native.py",
    "kernels/streamed.py",
]
# those that fail soonest, first, and by themselves: to collect all takes longer than to run these
TESTS = [
    "jump gate trust watch kernel_native bad_input offload golden".split(),
    "watched_models trust_ranks kernel_operations bugs_state properties bugs_step contract wrap".split()
    + "determinism stateful compile distributed deepspeed_ranks fuzz_corpus".split(),
]
TIMEOUT = 900  # seconds of all tests; a mutant that takes longer hangs


def without_annotations(source: str) -> str:
    """What a source does: its tree without annotations and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
    return ast.dump(tree)


def telling(operator: str) -> bool:
    """Not those with which floating tensors raise whatever the tests look at, or which change nothing."""
    _, *words = operator.split("_")
    if {"Is", "IsNot"} & set(words):
        return set(words) == {"Is", "IsNot"}
    return not words or words[-1] not in ("BitOr", "BitAnd", "BitXor", "LShift", "RShift")


def mutants(module: str, seed: int) -> Iterator[tuple[str, str]]:
    """One for each place: its diff and its source."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator, operator_names

    source = (ROOT / module).read_text()
    nodes = list(ast_nodes(get_ast(source)))
    places: dict[tuple[Any, str], list[tuple[Any, int]]] = {}
    for name in operator_names():
        if get_operator(name).arguments() or not telling(name):
            continue
        operator = get_operator(name)()
        found = [position for node in nodes for position in operator.mutation_positions(node)]
        kind = name.split("/")[-1].split("_")[0]
        for occurrence, position in enumerate(found):
            places.setdefault((position, kind), []).append((operator, occurrence))
    plain = without_annotations(source)
    for place, choices in sorted(places.items(), key=lambda item: str(item[0])):
        operator, occurrence = random.Random(f"{seed} {module} {place}").choice(choices)
        mutated = mutate_code(source, operator, occurrence)
        try:
            if mutated is None or without_annotations(mutated) == plain:
                continue
        except SyntaxError:
            continue
        diff = difflib.unified_diff(source.splitlines(), mutated.splitlines(), module, module, lineterm="", n=0)
        yield "\n".join(list(diff)[2:]), mutated


def workspace(folder: Path) -> Path:
    """A copy of the repository in `folder`, installed into a venv of its own that borrows this one's packages."""
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    for name in filter(None, names):
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / "copy" / name, follow_symlinks=False)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    own = next((folder / "venv").glob("lib/python*/site-packages"))
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [folder / "venv/bin/python", "-m", "pip", "install", "-q", "--no-deps", "-e"]
    subprocess.run([*install, folder / "copy"], check=True)
    return folder


def failing_test(folder: Path) -> str | None:
    """The first test that fails in a copy; None if all pass."""
    return next(filter(None, (failing_among(folder, names) for names in TESTS)), None)


def failing_among(folder: Path, names: list[str]) -> str | None:
    tests = [str(next((folder / "copy" / "tests").rglob(f"test_{name}.py"))) for name in names]
    # whether golden files can be overwritten is nothing that a mutant changes
    only = ["-m", "not slow", "-k", "not overwritten"]
    command = [folder / "venv/bin/python", "-m", "pytest", "-xq", *only, "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=folder / "copy", env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        said, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.wait()
        return "(time ran out)"
    if process.returncode == 0:
        return None
    lines = [line for line in said.splitlines() if line.startswith(("FAILED tests", "ERROR tests"))]
    return lines[0].split(" - ")[0].partition(" ")[2] if lines else "(collection)"


def score(rows: list[dict[str, Any]]) -> str:
    """A table: mutants and survivors by module, and the survivors."""
    lines = ["| module | mutants | killed | survived | score |", "|---|---|---|---|---|"]
    for module in [*dict.fromkeys(row["module"] for row in rows), "all"]:
        own = [row for row in rows if module in (row["module"], "all")]
        alive = [row for row in own if row["killed_by"] is None]
        share = 1 - len(alive) / len(own)
        lines.append(f"| {module} | {len(own)} | {len(own) - len(alive)} | {len(alive)} | {share:.0%} |")
    return "\n".join(lines + ["", *(f"{r['module']} {r['diff']}" for r in rows if r["killed_by"] is None)])


def main(
    json_file: Annotated[Path, typer.Option("--json", help="Where the results go; what it has is not repeated.")],
    modules: Annotated[list[str], typer.Option(help="Modules to change.")] = MODULES,
    sample: Annotated[int, typer.Option(help="Mutants of each module at most; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the choice of mutants.")] = 0,
    workers: Annotated[int, typer.Option(help="Mutants at a time, a copy of the repository each.")] = 2,
    again: Annotated[bool, typer.Option("--again", help="Test the survivors in the file once more.")] = False,
) -> None:
    """Change the code in one place at a time and see whether a test fails."""
    rows: list[dict[str, Any]] = json.loads(json_file.read_text()) if json_file.exists() else []
    made = {module: dict(mutants(module, seed)) for module in modules}
    rows = [row for row in rows if row["diff"] in made.get(row["module"], {row["diff"]})]  # of the code as it is
    if again:
        rows = [row for row in rows if row["killed_by"] is not None]
    done = {(row["module"], row["diff"]) for row in rows}
    todo = []
    for module in modules:
        diffs = list(made[module])
        chosen = random.Random(seed).sample(diffs, min(sample or len(diffs), len(diffs)))
        todo += [(module, diff) for diff in chosen if (module, diff) not in done]
    random.Random(seed).shuffle(todo)

    with tempfile.TemporaryDirectory() as own, Progress() as progress, ThreadPoolExecutor(workers) as pool:
        free: SimpleQueue[Path] = SimpleQueue()
        for folder in [workspace(Path(own) / str(i)) for i in range(workers)]:
            free.put(folder)
        if todo and (failed := failing_test(folder)):
            raise typer.BadParameter(f"{failed} fails without any change")

        def test(module: str, diff: str) -> dict[str, Any]:
            folder, begun = free.get(), time.perf_counter()
            file = folder / "copy" / module
            try:
                file.write_text(made[module][diff])
                killed_by = failing_test(folder)
            finally:
                shutil.copy2(ROOT / module, file)
                free.put(folder)
            seconds = round(time.perf_counter() - begun, 1)
            return {"module": module, "diff": diff, "killed_by": killed_by, "seconds": seconds}

        bar = progress.add_task("mutants", total=len(todo))
        for future in as_completed([pool.submit(test, *one) for one in todo]):
            rows.append(future.result())
            json_file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
            progress.advance(bar)
    print(score(rows))


if __name__ == "__main__":
    typer.run(main)
