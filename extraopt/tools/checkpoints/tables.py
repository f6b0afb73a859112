"""What `extraopt linearity` prints: the figures of a report as rich tables."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from .forecast import METHODS

TYPES = 20  # layer types listed, those with the most weights
WORDS = 10


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, title_justify="left", title_style="bold")
    table.add_column(columns[0], overflow="fold")  # a long name takes two lines before a number is cut
    for column in columns[1:]:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _number(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def _fits(report: dict[str, Any]) -> Table:
    names = ("", "R^2", "noise", "kept", "R^2", "noise", "slope", "cosine", "skill")
    table = _table("R^2 of value against step: medians of all weights that moved, and of those kept", *names)
    types = sorted(report["types"].items(), key=lambda item: -item[1]["elements"])[:TYPES]
    for name, row in [("all", report["total"]), *types]:
        table.add_row(
            name,
            _number(row["r2_median"]),
            _number(row["null_median"]),
            f"{row['kept']:.1%}",
            _number(row["kept_r2_median"]),
            _number(row["null_kept_r2_median"]),
            f"{row['slope_rms']:.0e}",
            _number(row["coherence_mean"]),
            _number(row["skill"][0]["skill"]["damped"]),
        )
    return table


def _skills(rows: list[dict[str, Any]]) -> Table:
    table = _table("Skill against persistence, by horizon", "steps ahead", *METHODS, "worth of extra", "starts")
    chosen = rows if len(rows) <= 12 else [rows[round(i * (len(rows) - 1) / 11)] for i in range(12)]
    for row in chosen:
        skills = (_number(row["skill"][method]) for method in METHODS)
        worth = row["worth"]["extra"]
        table.add_row(f"{row['steps']:g}", *skills, "-" if worth is None else f"{worth:.1f} steps", str(row["starts"]))
    return table


def _words(tokens: dict[str, Any]) -> Table:
    total = tokens["total"]
    title = (
        f"Log-probabilities of {total['elements']:,} tokens: median R^2 {_number(total['r2_median'])} (of noise"
        f" {_number(total['null_median'])}).\n{total['kept']:.0%} moved by over {tokens['filter']['min_move']} nats:"
        f" {_number(total['kept_r2_median'])} (of noise {_number(total['null_kept_r2_median'])})"
    )
    table = _table(title, "words that move most", "times", "change (nats)", "R^2")
    for word in tokens["words"][:WORDS]:
        table.add_row(
            escape(repr(word["word"])), str(word["count"]), f"{word['change']:+.2f}", _number(word["r2_median"])
        )
    return table


def linearity_tables(report: dict[str, Any]) -> RenderableType:
    """Everything that is worth reading of a report of `linearity`, its verdict last.

    Args:
        report: as `linearity` returns it; with "tokens", what `token_linearity` returned.
    """
    parts: list[RenderableType] = [_fits(report), _skills(report["total"]["skill"])]
    if "tokens" in report:
        parts.append(_words(report["tokens"]))
    parts.append(Text("\n\n".join(report["verdict"])))
    return Group(*parts)
