"""Budgets, steps to fixed rewards, and sigmoids, from the committed rows of rlvr.json and grpo_llm.json.

A setting is a task, an algorithm, a number of completions, what is trained, and a learning rate. Those count where
AdamW and ExtraAdam have runs; the paper's rule stands beside them where it has any. All are compared on the seeds that
every one of them has.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import grpo_llm
import report  # of benchmarks/rlvr
from reproduce_statistics import Sigmoid, bootstrap, fit_sigmoid

Row = dict[str, Any]
PAPERS = [
    *(f"RL-Extra ({k},{n}) {moments}" for k, n in ((20, 100), (100, 100)) for moments in ("kept", "reset")),
    "RL-Extra (20,100)",
]
BUDGETS = 5
MARKS = (0.3, 0.5, 0.7, 0.9)
WORST = 0.5  # of r2: below it a curve is no sigmoid that rises, such as that of a run that collapsed


def toy(folder: Path) -> Iterator[tuple[str, float, dict[str, list[Row]]]]:
    """The toy-scale benchmark: name, learning rate, rows by optimizer."""
    for cell in report.read(folder / "rlvr.json"):
        for lr in sorted(set(cell.rows["AdamW"]) & set(cell.rows["ExtraAdam"])):
            if cell.trains(lr):
                names = ["AdamW", "ExtraAdam", *PAPERS]
                yield cell.name, lr, {name: cell.rows[name][lr] for name in names if lr in cell.rows.get(name, {})}


def language(folder: Path) -> Iterator[tuple[str, float, dict[str, list[Row]]]]:
    """The language model: of each seed the longest run; of AdamW, where there is one, of ExtraAdam's machine."""
    rows = grpo_llm.paired(json.loads((folder / "grpo_llm.json").read_text()))
    found: dict[tuple[Any, ...], dict[str, dict[int, Row]]] = {}
    for row in sorted(rows, key=lambda row: len(row["curve"])):
        if row["optimizer"] in ("AdamW", "ExtraAdam", *PAPERS) and "note" not in row:
            found.setdefault((grpo_llm.where(row), row["lr"]), {}).setdefault(row["optimizer"], {})[row["seed"]] = row
    for (place, lr), by_name in sorted(found.items()):
        if len(by_name) > 1 and "AdamW" in by_name:
            task, tuning, completions, precision = place
            name = f"SmolLM2-135M on {task}, GRPO, {completions} a step, {tuning}, {precision}"
            yield name, lr, {name: list(own.values()) for name, own in by_name.items()}


def at(curve: Sequence[Sequence[float]], step: float, window: int) -> float:
    """The mean of the last `window` values up to a step, or of as many as there are."""
    return statistics.fmean([value for s, value in curve if s <= step][-window:])


def over(runs: Sequence[Any], statistic: Callable[[Sequence[Any]], float]) -> list[float]:
    """A statistic with the ends of its interval."""
    return [statistic(runs), *bootstrap(runs, statistic)]


def mean_curve(curves: Sequence[Sequence[Sequence[float]]]) -> list[tuple[float, float]]:
    """The mean over seeds at each step that all have."""
    return [(points[0][0], statistics.fmean(value for _, value in points)) for points in zip(*curves)]


def compare(name: str, lr: float, rows: dict[str, list[Row]], llm: bool) -> Row:
    """One setting."""
    seeds = sorted(set.intersection(*({row["seed"] for row in own} for own in rows.values())))
    chosen = {of: [next(r for r in own if r["seed"] == s) for s in seeds] for of, own in rows.items()}
    end = min(row["curve"][-1][0] for own in chosen.values() for row in own)
    raw = {of: [[p for p in row["curve"] if p[0] <= end] for row in own] for of, own in chosen.items()}
    if llm:  # single steps have few completions
        smooth = {of: [grpo_llm.values(row, "reward") for row in own] for of, own in chosen.items()}
        start, window = None, grpo_llm.WINDOW
    else:
        smooth = {of: [report.smooth(row["curve"]) for row in own] for of, own in chosen.items()}
        start = statistics.fmean(row["curve"][0][1] for row in chosen["AdamW"])
        window = 3  # as report.smooth
    first = max(curve[0][1] for curve in smooth["AdamW"])  # where some seed begins is no mark
    marks = [mark for mark in MARKS if mark > first][:3]
    steps = [round(end * i / BUDGETS) for i in range(1, BUDGETS + 1)]

    @cache
    def fitted(of: str, which: tuple[int, ...]) -> Sigmoid:
        curve = mean_curve([raw[of][i] for i in which])
        return fit_sigmoid([s for s, _ in curve], [r for _, r in curve], start=start)

    def parameter(of: str, what: str) -> Callable[[Sequence[int]], float]:
        return lambda which: getattr(fitted(of, tuple(sorted(which))), what)

    every, found = list(range(len(seeds))), []
    for of in chosen:
        fit = fitted(of, tuple(every))
        curves = smooth[of]
        part: Row = {"optimizer": of, "code": sorted({row["code"] for row in chosen[of] if "code" in row})}
        levels = {s: [[at(raw[name][i], s, window) for name in (of, "AdamW")] for i in every] for s in steps}
        part["budgets"] = [[s, *over(own, lambda x: statistics.fmean(a for a, _ in x))] for s, own in levels.items()]
        if of != "AdamW":  # seed by seed: seeds differ by more than optimizers do
            part["budgets_less_adamw"] = [
                [s, *over(own, lambda x: statistics.fmean(a - b for a, b in x))] for s, own in levels.items()
            ]
        reached = [[next((s for s, r in curve if r >= mark), math.inf) for curve in curves] for mark in marks]
        part["steps_to"] = [
            [mark, *over(own, statistics.median), sum(map(math.isfinite, own))] for mark, own in zip(marks, reached)
        ]
        part["sigmoid"] = {"r2": fit.r2, "bound": fit.bound, "rises": fit.r2 >= WORST and fit.asymptote > fit.start}
        for what in ("asymptote", "midpoint", "steepness"):
            part["sigmoid"][what] = over(every, parameter(of, what))
        if of != "AdamW":  # the same seeds for both in each resample
            part["asymptote_less_adamw"] = over(
                every, lambda w, of=of: parameter(of, "asymptote")(w) - parameter("AdamW", "asymptote")(w)
            )
            part["midpoint_of_adamw"] = over(
                every, lambda w, of=of: parameter("AdamW", "midpoint")(w) / parameter(of, "midpoint")(w)
            )
        found.append(part)
    return {"setting": name, "lr": lr, "seeds": seeds, "steps": end, "language_model": llm, "optimizers": found}


def every(folder: Path) -> list[Row]:
    """All settings, the language model first."""
    return [
        *(compare(name, lr, rows, True) for name, lr, rows in language(folder)),
        *(compare(name, lr, rows, False) for name, lr, rows in toy(folder)),
    ]
