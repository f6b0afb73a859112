"""Tables and pictures of a comparison, from its result file alone.

python benchmarks/rlvr/report.py benchmarks/results/rlvr.json             # tables beside it, rlvr.md, and pictures
python benchmarks/rlvr/report.py benchmarks/results/rlvr.json --page      # and the table in docs/results.md
python benchmarks/rlvr/report.py benchmarks/results/rlvr-slow.json --page # long budgets at low learning rates
python benchmarks/rlvr/report.py benchmarks/results/rlvr-held-out.json    # tables alone, beside it
python benchmarks/rlvr/report.py benchmarks/results/rlvr-ablations.json   # the rule with one thing changed
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

Row = dict[str, Any]
PAGE = Path(__file__).parents[2] / "docs" / "results.md"
LONG = 400  # steps; longer budgets are a comparison of their own
GAIN = 0.8  # part of AdamW's gain in accuracy, for the bars
BEGIN, END = "<!-- made by benchmarks/rlvr/report.py{of} -->", "<!-- end -->"


def name_of(row: Row) -> str:
    """The cell a row belongs to, in words."""
    s = row["settings"]
    long = f", {s['steps']} steps" if s["steps"] > LONG else ""
    return f"{row['task']}, {row['algorithm']}, {s['rollouts']} a step, {s['tuning']}{long}"


def smooth(curve: list[list[float]]) -> list[tuple[float, float]]:
    """Each evaluation averaged with the two before it: single evaluations of a noisy run jump up and down."""
    values = [a for _, a in curve]
    return [(step, statistics.mean(values[max(0, i - 2) : i + 1])) for i, (step, _) in enumerate(curve)]


def final(row: Row) -> float:
    """Accuracy at the end of the budget."""
    return smooth(row["curve"])[-1][1]


def area(row: Row) -> float:
    """Mean accuracy over the budget."""
    return statistics.mean(a for _, a in row["curve"][1:])


def steps_to(row: Row, target: float) -> float:
    """Real steps until the smoothed accuracy reaches `target`; infinity where it never does."""
    return next((step for step, a in smooth(row["curve"]) if a >= target), math.inf)


def speedup(theirs: list[Row], ours: list[Row]) -> list[float]:
    """For each seed: their steps to their own final accuracy over our steps to it; 0 where we never reach it."""
    by_seed = {row["seed"]: row for row in ours}
    return [
        max(steps_to(row, final(row)), 1) / max(steps_to(by_seed[row["seed"]], final(row)), 1)
        for row in theirs
        if row["seed"] in by_seed
    ]


def sooner(theirs: list[Row], ours: list[Row]) -> float:
    """Their steps to `GAIN` of their own gain over ours to the same accuracy: median over seeds, 0 if not reached."""
    by_seed = {row["seed"]: row for row in ours}
    ratios = []
    for row in theirs:
        start = row["curve"][0][1]
        if row["seed"] in by_seed and final(row) > start:
            target = start + GAIN * (final(row) - start)
            ratios.append(max(steps_to(row, target), 1) / max(steps_to(by_seed[row["seed"]], target), 1))
    return statistics.median(ratios) if ratios else math.nan


def geometric_mean(values: list[float]) -> float:
    """0 if any is 0."""
    return math.exp(statistics.mean(map(math.log, values))) if min(values) > 0 else 0.0


class Cell:
    """The rows of one cell, by optimizer and learning rate."""

    def __init__(self, rows: list[Row]) -> None:
        self.name, self.base = name_of(rows[0]), statistics.median(r["curve"][0][1] for r in rows)
        self.rows: dict[str, dict[float, list[Row]]] = defaultdict(lambda: defaultdict(list))
        for row in rows:
            self.rows[row["optimizer"]][row["lr"]].append(row)

    def median(self, optimizer: str, lr: float) -> float:
        return statistics.median(map(final, self.rows[optimizer][lr]))

    def best_lr(self, optimizer: str) -> float:
        """The learning rate with the highest median accuracy at the end of the budget."""
        return max(self.rows[optimizer], key=lambda lr: self.median(optimizer, lr))

    def trains(self, lr: float) -> bool:
        """Whether AdamW ends above where it began."""
        return self.median("AdamW", lr) > self.base

    def gains(self, lr: float) -> list[float]:
        """For each seed: ExtraAdam's accuracy at the end of the budget less AdamW's, at the same learning rate."""
        ends = {row["seed"]: final(row) for row in self.rows["AdamW"][lr]}
        return [final(row) - ends[row["seed"]] for row in self.rows["ExtraAdam"][lr]]

    def same_lr(self) -> dict[float, float]:
        """Median speedup over AdamW at the same learning rate, from a tenth of AdamW's best to its best."""
        best = self.best_lr("AdamW")
        lrs = [lr for lr in self.rows["AdamW"] if best / 10.5 <= lr <= best and lr in self.rows["ExtraAdam"]]
        return {lr: statistics.median(speedup(self.rows["AdamW"][lr], self.rows["ExtraAdam"][lr])) for lr in lrs}

    def against(self, optimizer: str) -> float:
        """Median speedup of ExtraAdam at its best learning rate over another at its best one."""
        mine = self.rows["ExtraAdam"][self.best_lr("ExtraAdam")]
        return statistics.median(speedup(self.rows[optimizer][self.best_lr(optimizer)], mine))

    @property
    def peers(self) -> list[str]:
        """The other optimizers."""
        return [o for o in self.rows if o != "AdamW" and not o.startswith("ExtraAdam")]

    def best_peer(self) -> str:
        """The one with the highest median accuracy at its best learning rate; there must be one."""
        return max(self.peers, key=lambda o: self.median(o, self.best_lr(o)))


def read(path: Path) -> list[Cell]:
    """The cells of a result file."""
    by_name: dict[str, list[Row]] = defaultdict(list)
    for row in json.loads(path.read_text()):
        by_name[name_of(row)].append(row)
    return [Cell(_paired(rows)) for rows in by_name.values()]


def _paired(rows: list[Row]) -> list[Row]:
    """Those of seeds that ExtraAdam has at each of its learning rates: the rest of a comparison under way waits."""
    ours = [row for row in rows if row["optimizer"] == "ExtraAdam"]
    by_lr = [{row["seed"] for row in ours if row["lr"] == lr} for lr in {row["lr"] for row in ours}]
    return [row for row in rows if all(row["seed"] in seeds for seeds in by_lr)]


def _table(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _number(x: float) -> str:
    return "not reached" if x == 0 else f"{x:.2f}x"


def summary(cells: list[Cell]) -> str:
    """One line a cell: the figures that the bars are about."""
    lines = []
    for cell in cells:
        same, best = cell.same_lr(), cell.best_lr("AdamW")
        trained = [lr for lr in cell.rows["ExtraAdam"] if cell.trains(lr)]
        gains = {lr: cell.gains(lr) for lr in trained}
        worst = min(trained, key=lambda lr: statistics.median(gains[lr]))
        below = sum(gain < 0 for lr in trained for gain in gains[lr])
        collapsed = [r for lr in trained for r in cell.rows["ExtraAdam"][lr] if r["collapsed"]]
        lines.append(
            [
                cell.name,
                f"{cell.base:.2f}, {cell.median('AdamW', best):.2f}, {cell.median('ExtraAdam', best):.2f} ({best:g})",
                ", ".join(f"{lr:g}: {_number(x)}" for lr, x in sorted(same.items())),
                _number(geometric_mean(list(same.values()))),
                _number(cell.against("AdamW")),
                f"{_number(cell.against(cell.best_peer()))} ({cell.best_peer()})" if cell.peers else "",
                f"{statistics.median(gains[worst]):+.3f} at {worst:g}",
                f"{below} of {sum(map(len, gains.values()))}",
                f"{len(collapsed)}",
            ]
        )
    header = [
        "task, algorithm, rollouts, tuning",
        "before, AdamW, ExtraAdam (AdamW's best lr)",
        "speed at the same lr",
        "geometric mean",
        "both at their best lr",
        "best other peer",
        "end less AdamW's, worst lr",
        "ends below AdamW's",
        "collapsed",
    ]
    shown = [i for i in range(len(header)) if any(line[i] for line in lines)]  # no peers, no column
    return _table([header[i] for i in shown], [[line[i] for i in shown] for line in lines])


def _over_cells(values: dict[str, float]) -> list[str]:
    """Geometric mean, the range, how many."""
    if not values:
        return ["-", "", "0"]
    reached = [v for v in values.values() if v > 0]
    missed = f", {len(values) - len(reached)} not reached" if len(reached) < len(values) else ""
    return [f"{geometric_mean(reached):.2f}x", f"{min(reached):.2f} to {max(reached):.2f}{missed}", f"{len(values)}"]


def bars(cells: list[Cell]) -> str:
    """What to expect at which learning rate: real steps to `GAIN` of a reference's gain, theirs over ExtraAdam's."""
    full = [c for c in cells if c.name.split(", ")[3] == "full" and not c.name.startswith("supervised")]
    tenth, same, default, best, peer = ({} for _ in range(5))
    for c in full:
        adamw, ours, top = c.rows["AdamW"], c.rows["ExtraAdam"], c.best_lr("AdamW")
        ratios = [sooner(adamw[lr], ours[lr]) for lr in adamw if top / 10.5 <= lr <= top and lr in ours]
        same[c.name] = geometric_mean(ratios)
        low = [lr for lr in adamw if top / 10.5 <= lr <= top / 9.5 and lr in ours]
        if low:
            tenth[c.name] = sooner(adamw[low[0]], ours[low[0]])
            default[c.name] = sooner(adamw[top], ours[low[0]])
        best[c.name] = max(sooner(adamw[top], rows) for rows in ours.values())
        if c.peers:
            rival = c.best_peer()
            peer[c.name] = max(sooner(c.rows[rival][c.best_lr(rival)], rows) for rows in ours.values())
    lines = [
        ["a tenth of AdamW's best learning rate, AdamW at the same", *_over_cells(tenth)],
        ["from a tenth of the best to the best, AdamW at the same", *_over_cells(same)],
        ["a tenth of the best, AdamW at its best", *_over_cells(default)],
        ["any learning rate, AdamW at its best", *_over_cells(best)],
        *([["any learning rate, the best peer at its best", *_over_cells(peer)]] if peer else []),
    ]
    return _table(["learning rate", "speed", "over cells", "cells"], lines)


def long_budgets(cells: list[Cell]) -> str:
    """One line for each learning rate of budgets at which AdamW is far from its end when they are used up."""
    lines = []
    for cell in cells:
        for lr, ours in sorted(cell.rows["ExtraAdam"].items()):
            adamw = sorted(cell.rows["AdamW"][lr], key=lambda row: row["seed"])
            ours = sorted(ours, key=lambda row: row["seed"])
            ends = [", ".join(f"{final(row):.2f}" for row in rows) for rows in (adamw, ours)]
            met = [f"{steps_to(own, final(row)):g}" for row, own in zip(adamw, ours, strict=True)]
            whole, part = statistics.median(speedup(adamw, ours)), sooner(adamw, ours)
            lines.append([f"{cell.name}, {lr:g}", *ends, ", ".join(met), f"{whole:.1f}x", f"{part:.1f}x"])
    header = ["AdamW's end", "ExtraAdam's end", "ExtraAdam's steps to it", "speed", f"to {GAIN:.0%} of AdamW's gain"]
    return _table(["task, algorithm, rollouts, tuning, budget, learning rate", *header], lines)


def details(cell: Cell) -> str:
    """Every optimizer at every learning rate: end, mean, steps to fixed accuracies, collapsed runs."""
    marks = [m for m in (0.1, 0.3, 0.5, 0.7, 0.9) if m > cell.base][:3]
    lines = []
    for optimizer, by_lr in cell.rows.items():
        for lr, rows in sorted(by_lr.items()):
            ends = sorted(map(final, rows))
            steps = [statistics.median(steps_to(r, m) for r in rows) for m in marks]
            lines.append(
                [
                    optimizer,
                    f"{lr:g}",
                    f"{statistics.median(ends):.3f} ({ends[0]:.3f}-{ends[-1]:.3f})",
                    f"{statistics.median(map(area, rows)):.3f}",
                    *("-" if math.isinf(s) else f"{s:g}" for s in steps),
                    f"{sum(r['collapsed'] for r in rows)} of {len(rows)}",
                ]
            )
    header = ["optimizer", "lr", "end (range)", "mean", *(f"steps to {m:g}" for m in marks), "collapsed"]
    return f"### {cell.name}\n\nBefore training: {cell.base:.3f}.\n\n" + _table(header, lines)


def _save(figure: Any, path: Path) -> None:
    """As a PNG of few colours, a third of the size."""
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=100)
    plt.close(figure)
    few = Image.open(path).convert("RGB").quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


def picture(cell: Cell, path: Path) -> None:
    """Curves of AdamW, ExtraAdam and the best other peer at their best learning rates, and ends by learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    shown = ["AdamW", "ExtraAdam", *([cell.best_peer()] if cell.peers else [])]
    for optimizer, colour in zip(shown, ("#666666", "#0072b2", "#d55e00")):
        lr = cell.best_lr(optimizer)
        curves = [[a for _, a in r["curve"]] for r in cell.rows[optimizer][lr]]
        steps = [s for s, _ in cell.rows[optimizer][lr][0]["curve"]]
        left.plot(steps, [statistics.median(a) for a in zip(*curves)], color=colour, label=f"{optimizer}, lr {lr:g}")
        left.fill_between(
            steps, [min(a) for a in zip(*curves)], [max(a) for a in zip(*curves)], color=colour, alpha=0.15
        )
        lrs = sorted(cell.rows[optimizer])
        ends = [sorted(map(final, cell.rows[optimizer][lr])) for lr in lrs]
        right.plot(lrs, [statistics.median(e) for e in ends], "o-", color=colour)
        right.fill_between(lrs, [e[0] for e in ends], [e[-1] for e in ends], color=colour, alpha=0.15)
    left.set(xlabel="real steps", ylabel="accuracy", title="each at its best learning rate")
    right.set(xscale="log", xlabel="learning rate", ylabel="accuracy at the end", title="by learning rate")
    right.set_xticks(sorted(cell.rows["AdamW"]), [f"{lr:g}" for lr in sorted(cell.rows["AdamW"])])
    right.minorticks_off()
    right.axhline(cell.base, color="#999999", linestyle=":")
    handles, names = left.get_legend_handles_labels()
    handles, names = handles + right.lines[-1:], [*names, "before training"]
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)  # inside it would hide points
    figure.suptitle(f"{cell.name} (median and range over seeds)")
    _save(figure, path)


def long_picture(cells: list[Cell], path: Path) -> None:
    """Every run of long budgets, AdamW's and ExtraAdam's, one panel for each learning rate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [(cell, lr) for cell in cells for lr in sorted(cell.rows["ExtraAdam"])]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.2 * len(panels), 3.2), sharey=True, layout="constrained")
    for axis, (cell, lr) in zip(axes, panels, strict=True):
        for optimizer, colour in (("AdamW", "#666666"), ("ExtraAdam", "#0072b2")):
            for i, row in enumerate(cell.rows[optimizer][lr]):
                steps, accuracies = zip(*smooth(row["curve"]))
                axis.plot(steps, accuracies, color=colour, lw=1.2, label=None if i else optimizer)
        axis.set(xlabel="real steps", title=f"{cell.name.split(', ')[2]}, lr {lr:g}")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(ylabel="accuracy")
    axes[0].legend(frameon=False)
    _save(figure, path)


def overview(cells: list[Cell], path: Path) -> None:
    """Speed against AdamW in every cell: each seed, and medians, at the same learning rate and each at its best."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 0.7 * len(cells) + 1.2), layout="constrained")
    for y, cell in enumerate(reversed(cells)):
        lrs = sorted(cell.same_lr())
        for i, lr in enumerate(lrs):
            own = speedup(cell.rows["AdamW"][lr], cell.rows["ExtraAdam"][lr])
            place = y + 0.12 * (i - (len(lrs) - 1) / 2)
            axes.plot(own, [place] * len(own), "o", color="#0072b2", alpha=0.25, ms=4)
            median = statistics.median(own)
            label = "same learning rate (faint: single seeds)" if y == i == 0 else None
            axes.plot(median, place, "o", color="#0072b2", ms=7, label=label)
        axes.plot(cell.against("AdamW"), y, "D", color="#d55e00", ms=7, label=None if y else "each at its best")
    axes.axvline(1, color="#666666", linestyle=":")
    axes.set_yticks(range(len(cells)), [cell.name for cell in reversed(cells)])
    axes.set(xlabel="AdamW's steps to its final accuracy / ExtraAdam's steps to it (0: not reached)", xlim=(-0.1, None))
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def ablations(rows: list[Row]) -> str:
    """The rule with one thing changed: mean accuracy over the budget and at the end, each a mean over seeds.

    Only seeds that all of the rules have. In bold what is better by .02 or more than the default in the same column.
    """
    by_rule: dict[str, dict[tuple[str, float], dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        by_rule[row["optimizer"]][name_of(row), row["lr"]][row["seed"]] = row
    columns = sorted({column for own in by_rule.values() for column in own})
    seeds = {column: set.intersection(*(set(own[column]) for own in by_rule.values())) for column in columns}
    columns = [column for column in columns if seeds[column]]

    def means(rule: str) -> list[tuple[float, float]]:
        own = [[by_rule[rule][column][seed] for seed in sorted(seeds[column])] for column in columns]
        return [(statistics.mean(map(area, some)), statistics.mean(map(final, some))) for some in own]

    default, lines = means("ExtraAdam"), []
    for rule in by_rule:
        pairs = [zip(now, before) for now, before in zip(means(rule), default)]
        cells = [", ".join(f"**{a:.3f}**" if a >= b + 0.02 else f"{a:.3f}" for a, b in pair) for pair in pairs]
        lines.append([rule.removeprefix("ExtraAdam").strip() or "the default", *cells])
    heads = [f"{name.split(',')[2].split()[0]} a step, {lr:g} ({len(seeds[name, lr])} seeds)" for name, lr in columns]
    return _table(["changed", *heads], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--page", action="store_true", help="put the summary into docs/results.md")
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())
    if all(row["optimizer"].startswith("ExtraAdam") for row in rows):
        table = ablations(rows)
        args.results.with_suffix(".md").write_text(f"# The rule with one thing changed\n\n{table}\n")
        print(table)
        return
    cells = read(args.results)
    if all(row["settings"]["steps"] > LONG for row in rows):
        table = long_budgets(cells)
        long_picture(cells, args.results.with_suffix(".png"))
        parts = ["# Long budgets at low learning rates", table, f"![Every run]({args.results.stem}.png)"]
        parts += [details(cell) for cell in cells]
        args.results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
        print(table)
        if args.page:
            _put(f" {args.results.stem}", table)
        return
    parts = ["# The comparison, cell by cell", summary(cells), bars(cells)]
    if args.results.stem != "rlvr":  # held-out seeds, other policies: tables alone
        parts += [details(cell) for cell in cells]
    else:
        folder = args.results.with_suffix("")
        folder.mkdir(exist_ok=True)
        overview(cells, folder / "overview.png")
        parts.insert(1, f"![Speed in each cell]({folder.name}/overview.png)")
        for i, cell in enumerate(cells):
            path = folder / f"{i}-{cell.name.split(',')[0]}.png"
            picture(cell, path)
            parts += [details(cell), f"![Curves, and accuracies at the end]({folder.name}/{path.name})"]
        if args.page:
            _put("", f"{summary(cells)}\n\n{bars(cells)}")
    args.results.with_suffix(".md").write_text("\n\n".join(parts) + "\n")
    print(summary(cells), bars(cells), sep="\n\n")


def _put(of: str, table: str) -> None:
    begin = BEGIN.format(of=of)
    before, found, rest = PAGE.read_text().partition(begin)
    if not found:
        raise SystemExit(f"{PAGE} has no line {begin}, where the table belongs.")
    PAGE.write_text(f"{before}{begin}\n{table}\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
