"""Pictures of what the tools measure, as PNG, SVG or PDF by the file's extension."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from ..gate import momentum_coherence

# Okabe and Ito's colours, which the colour-blind can tell apart; each with a marker, for print without colour
BLUE, RED, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6b7280"
CYCLE = (BLUE, RED, GREEN, PURPLE, "#E69F00", "#56B4E9", "#000000", GREY)
METHODS = {
    "secant": ("last drift, unchanged", RED, "s", "--"),
    "ols": ("line through all so far", PURPLE, "^", ":"),
    "damped": ("last drift, damped", GREEN, "D", "-."),
    "extra": ("ExtraAdam's jump", BLUE, "o", "-"),
}
LOWEST = -1.0  # skill drawn; what lies below stands at the edge, with its value


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), dpi=150, layout="constrained")


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)


Histogram = tuple[Sequence[float], float | None]  # counts in equal bins from 0 to 1, median


def _histogram(axes: Axes, found: Histogram, null: Histogram, title: str) -> None:
    edges = np.linspace(0, 1, len(found[0]) + 1)
    for (counts, median), color, name, style in (
        (found, BLUE, "this run", "-"),
        (null, RED, "walks without a direction", "--"),
    ):
        heights = np.asarray(counts, dtype=float)
        if median is not None:
            heights = heights / heights.sum() * len(heights)
            axes.stairs(heights, edges, color=color, linewidth=1.8, linestyle=style, label=name, zorder=3)
            if name == "this run":
                axes.stairs(heights, edges, color=color, alpha=0.2, fill=True)
            axes.axvline(median, color=color, linewidth=1, linestyle=style)
            axes.plot([], [], " ", label=f"   median {median:.2f}")
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=r"$R^2$ of value against step", ylabel="density", xlim=(0, 1))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.05)
    if axes.has_data():
        axes.legend(frameon=False, loc="upper left", fontsize=9)
    _tidy(axes)


def r2_histogram(report: dict[str, Any], path: Path, *, what: str = "weights") -> None:
    """The R^2 of all paths beside its null, and of those that the filter keeps beside theirs.

    Args:
        report: of `checkpoints.linearity.linearity`, or its "tokens".
        path: file to write.
        what: the things whose paths these are.
    """
    figure, counts, total = _figure(11, 4.2), report["histogram"], report["total"]
    left, right = figure.subplots(1, 2)
    still = f" ({total['constant']:.0%} never move)" if total["constant"] >= 0.005 else ""
    run, null = (counts["all"], total["r2_median"]), (counts["walks"], total["null_median"])
    _histogram(left, run, null, f"All {what} that move{still}")
    unit = " nats" if what == "tokens" else ""
    rule = f"moved by over {report['filter']['min_move']:g}{unit}"
    if report["filter"]["min_values"] > 2:
        rule += f", {report['filter']['min_values']} or more values"
    shares = f"{total['kept']:.1%} of {what}, {total['null_kept']:.1%} of walks"
    run = counts["kept"], total["kept_r2_median"]
    null = counts["walks_kept"], total["null_kept_r2_median"]
    _histogram(right, run, null, f"Through the filter: {rule}\nkept: {shares}")
    if not total["kept"]:
        right.text(0.5, 0.5, f"The filter keeps none of the {what}", ha="center", color=GREY)
    figure.savefig(path)


def skill(report: dict[str, Any], path: Path) -> None:
    """The skill of each forecast by horizon, and the cosine of consecutive drifts over the run.

    Args:
        report: of `checkpoints.linearity.linearity`, or its "tokens".
        path: file to write.
    """
    figure, rows, steps = _figure(11, 4.4), report["total"]["skill"], report["steps"]
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    left.axhline(0, color=GREY, linewidth=1)
    for method, (label, color, marker, style) in METHODS.items():
        points = [(row["steps"], row["skill"][method]) for row in rows if row["skill"][method] is not None]
        if points:
            x, y = zip(*points)
            shown = [max(LOWEST, value) for value in y]
            left.plot(x, shown, color=color, marker=marker, ms=5, ls=style, lw=1.8, label=label, zorder=3)
    left.set(xlabel="horizon (optimizer steps ahead)", ylabel="skill")
    left.set_title("Forecasts of held-out checkpoints\n1: perfect, 0: no better than persistence", fontsize=11)
    cut = [row["skill"][m] for row in rows for m in METHODS if row["skill"][m] is not None]
    left.set_ylim(max(LOWEST, min([-0.1, *cut])) - 0.06, 1.06)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    if cut and min(cut) < LOWEST:
        left.text(0.99, 0.06, f"cut off at {LOWEST:g}; lowest {min(cut):.1f}", transform=left.transAxes, ha="right",
                  va="bottom", fontsize=8, color=GREY)  # fmt: skip
    if cut:
        left.legend(frameon=False, fontsize=9, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.16))
    _tidy(left)
    right.axhline(0, color=GREY, linewidth=1)
    floor = momentum_coherence(min(b - a for a, b in zip(steps, steps[1:])))
    right.axhline(floor, color=RED, linewidth=1, linestyle="--")
    right.text(steps[-1], floor + 0.01, "momentum alone", color=RED, fontsize=8, ha="right", va="bottom")
    right.plot(steps[1:-1], report["total"]["coherence"], color=BLUE, marker="o", ms=5, lw=1.8, zorder=3)
    right.set(xlabel="optimizer step", ylabel="cosine", xlim=(steps[0], steps[-1]))
    right.set_ylim(min(-0.2, *(c - 0.1 for c in report["total"]["coherence"])), 1.06)
    right.set_title("Coherence: the drift into a checkpoint\nand the drift out of it", fontsize=11)
    _tidy(right)
    figure.savefig(path)


def _grid(report: dict[str, Any], value: Any) -> tuple[list[str], list[int], np.ndarray[Any, Any]]:
    """Mean of a figure over the tensors of a kind in each layer: kinds, layers, [kinds, layers]."""
    cells: dict[tuple[str, int], list[float]] = {}
    for tensor in report["tensors"].values():
        figure = value(tensor)
        if figure is not None:
            cells.setdefault((tensor["type"], -1 if tensor["layer"] is None else tensor["layer"]), []).append(figure)
    kinds = list(dict.fromkeys(tensor["type"] for tensor in report["tensors"].values()))
    layers = sorted({-1 if t["layer"] is None else t["layer"] for t in report["tensors"].values()})
    grid = np.full((len(kinds), len(layers)), np.nan)
    for (kind, layer), figures in cells.items():
        grid[kinds.index(kind), layers.index(layer)] = sum(figures) / len(figures)
    return kinds, layers, grid


def layer_map(report: dict[str, Any], path: Path) -> None:
    """The median R^2 above its null, and the coherence, of each kind of tensor in each layer.

    Args:
        report: of `checkpoints.linearity.linearity`.
        path: file to write.
    """

    def excess(tensor: dict[str, Any]) -> float | None:
        if tensor["r2_median"] is None or tensor["null_median"] is None:
            return None
        return float(tensor["r2_median"] - tensor["null_median"])

    def cosine(tensor: dict[str, Any]) -> float | None:
        return float(tensor["coherence_mean"]) if tensor["r2_median"] is not None else None

    kinds, layers, first = _grid(report, excess)
    panels = (
        (first, r"median $R^2$, less that of noise", 0.6),
        (_grid(report, cosine)[2], "mean cosine of consecutive drifts", 1.0),
    )
    width = 3.2 + 2 * max(1.8, 0.17 * len(layers))
    figure = _figure(width, 1.7 + 0.26 * len(kinds))
    for axes, (grid, title, limit) in zip(figure.subplots(1, 2, sharey=True), panels):
        axes.set_facecolor("#d1d5db")  # no such tensor, or one that never moved
        image = axes.imshow(grid, aspect="auto", cmap="PuOr_r", vmin=-limit, vmax=limit, interpolation="none")
        figure.colorbar(image, ax=axes, location="top", label=title, aspect=30)
        every = max(1, len(layers) // 10)
        ticks = [i for i, layer in enumerate(layers) if layer < 0 or layer % every == 0]
        axes.set_xticks(ticks, ["none" if layers[i] < 0 else str(layers[i]) for i in ticks], fontsize=8)
        if layers[0] < 0:
            axes.get_xticklabels()[0].set_rotation(90)
        axes.set_xlabel("layer")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=8)
    figure.savefig(path)


def token_curves(report: dict[str, Any], path: Path, *, count: int = 8) -> None:
    """The log-probabilities of the tokens that moved most, over the checkpoints.

    Args:
        report: of `checkpoints.tokens.token_linearity`.
        path: file to write.
        count: tokens to draw.
    """
    figure = _figure(11, 5)
    axes, markers = figure.subplots(), "osD^vP*X"
    for i, token in enumerate(report["tokens"][:count]):
        before = " ".join(token["context"].split())[-24:]
        text = repr(token["text"])[1:-1] or " "
        name = f"{before} [{text}]  ($R^2$ {token['r2']:.2f})".replace("$R^2$", "\0").replace("$", r"\$")
        name = name.replace("\0", "$R^2$")
        axes.plot(report["steps"], token["log_probs"], color=CYCLE[i % len(CYCLE)], marker=markers[i % len(markers)],
                  ms=5, lw=1.6, label=name)  # fmt: skip
    axes.set(xlabel="optimizer step", ylabel="log-probability (nats)")
    axes.set_title("Tokens of the given responses whose log-probability moved most")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5), title="context [token]")
    _tidy(axes)
    figure.savefig(path)


def sweep(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """The score of each alpha: the inverted U of extrapolation, with its top marked.

    Args:
        rows: of `checkpoints.Sweep`, each with a score.
        path: file to write.
    """
    alphas, scores = [row["alpha"] for row in rows], [row["score"] for row in rows]
    top = int(np.argmax(scores))
    figure = _figure(6.5, 4)
    axes = figure.add_subplot()
    axes.plot(alphas, scores, color=BLUE, marker="o", linewidth=1.8, zorder=3)
    axes.plot(alphas[top], scores[top], color=RED, marker="*", markersize=16, linestyle="none", zorder=4,
              label=f"best: alpha {alphas[top]:g}, score {scores[top]:.4g}")  # fmt: skip
    axes.set(xlabel=r"$\alpha$ (0: the last checkpoint itself)", ylabel="score", title="Weight extrapolation")
    axes.legend(frameon=False)
    _tidy(axes)
    figure.savefig(path)
