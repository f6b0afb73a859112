"""The page of `extraopt report`: HTML that needs nothing else, with its charts as SVG that follow light and dark."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from functools import partial
from html import escape
from io import StringIO
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..gate import momentum_coherence
from .checkpoints import CheckpointError
from .plots import BLUE, GREEN, GREY, RED
from .report import MOST_MARKS, Ends, Row, Run, ends, value_or_0

INK, MOST_METRICS, MOST_LINES, FEW = "#1f2937", 5, 40, 50
COLORS = {INK: "ink", GREY: "soft", BLUE: "line", GREEN: "jump", RED: "warn"}  # drawn in these, shown as CSS variables
COLUMNS = ("length", "gate", "coherence", "drift_norm", "jumped", "refused")
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1f2937;--soft:#5b6472;--line:#0072b2;--jump:#008a64;--warn:#b8480a;
--rule:#d5d9e0}
@media(prefers-color-scheme:dark){:root{--bg:#14181f;--ink:#e6e9ee;--soft:#a3acb9;--line:#5db8f0;--jump:#3fcf9f;
--warn:#ff9d5c;--rule:#39414d}}
body{margin:0;background:var(--bg);color:var(--ink);font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
main{max-width:72rem;margin:auto;padding:1rem}h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.05rem;margin:0}
p,li{max-width:46rem;margin:.4rem 0}.warn{color:var(--warn)}.soft,figcaption p{color:var(--soft);font-size:.9rem}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(10rem,1fr));gap:.8rem;margin:1.2rem 0}
dl div{border-top:2px solid var(--rule);padding-top:.3rem}dt{color:var(--soft);font-size:.85rem}
dd{margin:0;font-size:1.25rem}.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));
gap:1.6rem}figure{margin:0;min-width:0;display:flex;flex-direction:column;justify-content:space-between}
svg{display:block;width:100%;height:auto}svg *{stroke-linejoin:round}section{margin:1.6rem 0}
.key{margin-bottom:1rem}
.key span{display:inline-block;margin-right:1.2rem}.key i{display:inline-block;height:1em;vertical-align:-.15em;
margin-right:.4em;border-left:3px solid var(--jump)}.key .r{border-left:3px dotted var(--warn)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;
font-variant-numeric:tabular-nums;overflow-wrap:normal}td,th{padding:.2rem .8rem .2rem 0;text-align:right;
border-bottom:1px solid var(--rule);white-space:nowrap}
td:first-child,th:first-child{text-align:left}summary{cursor:pointer}
"""


def number(value: float | None, form: str = ".4g") -> str:
    """A number for people, or a dash."""
    return "\u2013" if value is None or not math.isfinite(value) else format(value, form)


def _svg(name: str, label: str, xlabel: str, draw: Callable[[Axes], None]) -> str:
    """A chart to stand in a page: text as text, colours as CSS variables, ids that no other chart has."""
    rc = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 12, "text.color": INK, "axes.edgecolor": GREY}
    rc |= {"xtick.color": INK, "ytick.color": INK, "axes.labelcolor": INK, "grid.color": GREY}
    with rc_context(rc):  # type: ignore[arg-type]
        figure = Figure(figsize=(5.6, 3.4), layout="constrained", facecolor="none")
        axes = figure.add_subplot(facecolor="none")
        draw(axes)
        axes.set_xlabel(xlabel)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.2)
        axes.locator_params(axis="x", nbins=6)
        buffer = StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", buffer.getvalue(), flags=re.S)
    svg = re.sub(r"font: (\S+) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r'(\bid="|url\(#|href="#)', rf"\1{name}-", svg)
    for color, variable in COLORS.items():
        svg = svg.replace(color.lower(), f"var(--{variable})")
    box, inside = re.findall(r'<svg[^>]*viewBox="([\d. ]+)"[^>]*>(.*)', svg, re.S)[0]
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} viewBox="{box}" role="img" aria-label="{label}"><title>{label}</title>{inside.strip()}'


def _curve(axes: Axes, run: Run, found: list[Ends], key: str, window: int, effective: bool) -> None:
    """A metric, its trailing mean, and what happened to the weights meanwhile."""
    jumps, total, at = {e.row["step"]: e.ahead or 0.0 for e in found if effective}, 0.0, dict[float, float]()
    x, y = list[float](), list[float]()
    for row in run.rows:
        at[row["step"]], jump = row["step"] + total, jumps.get(row["step"], 0.0)
        if math.isfinite(row.get(key, math.nan)):  # a step is logged as of before its jump, an evaluation of after it
            x.append(at[row["step"]] + (jump if key.startswith("eval_") else 0.0))
            y.append(row[key])
        total += jump
    few = len(x) < FEW
    left, right = run.rows[0]["step"], run.rows[-1]["step"] + total
    axes.set_xlim(left - 0.02 * (right - left) - 0.5, right + 0.02 * (right - left) + 0.5)
    axes.plot(x, y, color=BLUE, linewidth=1.6 if few else 1, alpha=1 if few else 0.4, marker="o" if few else "", ms=3.5)
    if not few:
        mean = [fmean(y[max(0, i + 1 - window) : i + 1]) for i in range(len(y))]
        axes.plot(x, mean, color=BLUE, linewidth=1.8)
    top = 1 if len(found) <= MOST_LINES else 0.08
    for e in found[:: 1 + len(found) // MOST_MARKS]:
        start, gate = at[e.row["step"]], min(1.0, value_or_0(e.row, "extra/gate"))
        if effective and e.ahead:
            axes.axvspan(start, start + e.ahead, color=GREEN, alpha=0.1 + 0.35 * gate, linewidth=0)
        elif value_or_0(e.row, "extra/jumped") > 0:
            axes.axvline(start, ymax=top, color=GREEN, alpha=0.2 + 0.7 * gate, linewidth=1.2)
    marked = [row for row in run.rows if value_or_0(row, "extra/refused") > 0]
    for row in marked[:: 1 + len(marked) // MOST_MARKS]:
        axes.axvline(at[row["step"]], color=RED, linestyle=":", linewidth=1.4)


def _levels(axes: Axes, run: Run, found: list[Ends]) -> None:
    """Coherence, and where the gates begin to open and are open, which follows from the hyperparameters."""
    axes.axhline(0, color=GREY, linewidth=0.8)
    if run.hyperparameters and run.hyperparameters["extra_gate"] is not None and found:
        every, gate = run.hyperparameters["extra_every"], run.hyperparameters["extra_gate"]
        beta = run.hyperparameters["extra_beta"]
        most = min(10_000, math.ceil(10 / (1 - beta)))  # drifts beyond these change nothing
        some = found if len(found) <= FEW * 10 else [*found[:: len(found) // (FEW * 10) + 1], found[-1]]
        steps = [e.row["step"] for e in some]
        low = [
            momentum_coherence(every, beta, run.hyperparameters["momentum"], min(most, max(1, e.seen))) for e in some
        ]
        axes.plot(steps, low, color=GREY, linestyle="--", linewidth=1.3)
        axes.plot(steps, [c + gate * (1 - c) for c in low], color=GREEN, linestyle=":", linewidth=1.6)
    _series(axes, found, "coherence")
    axes.set_ylim(min(-0.1, axes.get_ylim()[0]), 1.05)


def _series(axes: Axes, found: list[Ends], key: str) -> None:
    points = [(e.row["step"], e.row.get(f"extra/{key}", math.nan)) for e in found]
    points = [point for point in points if math.isfinite(point[1])]
    few = len(points) <= MOST_LINES
    axes.plot([x for x, _ in points], [y for _, y in points], color=BLUE, marker="o" if few else "", ms=3.5, lw=1.4)


def _gates(axes: Axes, found: list[Ends]) -> None:
    _series(axes, found, "gate")
    axes.set_ylim(-0.03, 1.05)


def _drawn(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    finite = [(key, of) for key, of in summary["metrics"].items() if of["values"]]
    return dict(finite[:MOST_METRICS])


def _charts(run: Run, summary: dict[str, Any]) -> list[str]:
    found, charts = ends(run), list[str]()

    def add(title: str, says: str, draw: Callable[[Axes], None], xlabel: str = "optimizer step") -> None:
        svg = _svg(f"c{len(charts)}", f"{title}, by {xlabel}", xlabel, draw)
        charts.append(f"<figure><figcaption><h2>{title}</h2><p>{says}</p></figcaption>{svg}</figure>")

    for key, of in _drawn(summary).items():
        curve = partial(_curve, run=run, found=found, key=key, window=of["window"])
        says = f"; bold: the mean of the last {of['window']}" if of["values"] >= FEW else ""
        add(escape(key), f"As logged, at real optimizer steps{says}.", partial(curve, effective=False))
        if summary["jumped_steps"] is not None:
            says = (
                "The same values, at real steps plus those jumped: gate times the length that was chosen. A band is as "
                "wide as its jump."
            )
            add(f"{escape(key)}, effective steps", says, partial(curve, effective=True), "effective step")
    if not found:
        return charts
    says = (
        "How far the gates were open when a cycle ended, over all tensors: 0, none; 1, all, by the length "
        "that was chosen. The first cycle has no estimate to compare with."
    )
    add("Gate", says, partial(_gates, found=found))
    levels = "Noise shows what momentum alone makes of it: by default 0.52 at first and about 0.2 later."
    if run.hyperparameters and run.hyperparameters["extra_gate"] is not None:
        levels = "Dashed: what momentum alone would show, where a gate begins to open. Dotted: where it is fully open."
    says = "Cosine of a cycle's drift with the estimate before it, over all tensors: 1, straight on; below 0, back. "
    if summary["along"] is not None:
        levels += (
            f" On average {summary['along']:.0%} of a drift's squared length lay along the estimate (cosine squared)."
        )
    add("Coherence: how straight the path was", says + levels, partial(_levels, run=run, found=found))
    says = "Length of the drift estimate, in weight units. It falls with the learning rate, and where drifts cancel."
    add("Drift norm", says, partial(_series, found=found, key="drift_norm"))
    return charts


def _facts(summary: dict[str, Any]) -> list[tuple[str, str]]:
    of, facts = summary, [("steps", f"{summary['steps']:,}"), ("cycles ended", f"{summary['cycles']:,}")]
    facts += [("cycles with a jump", f"{of['jumps']:,}"), ("mean gate", number(of["mean_gate"], ".2f"))]
    facts += [("mean coherence", number(of["mean_coherence"], ".2f")), ("tensors refused", f"{of['refused']:,}")]
    facts += [("mean length", number(of["mean_length"], ".1f"))]
    facts += [("effective steps", "unknown" if of["effective_steps"] is None else f"{of['effective_steps']:,.0f}")]
    for key, metric in _drawn(summary).items():
        change = f"{number(metric['first'], '.3g')} \u2192 {number(metric['last'], '.3g')}"
        facts.append((f"{escape(key)}, first to last", change))
    return facts


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{cells}</tr></thead><tbody>\n{body}</tbody></table></div>'
    )


def _cycles(found: list[Ends], rows: list[Row]) -> str:
    ahead = {e.row["step"]: e.ahead for e in found}
    told = [row for row in rows if row["step"] in ahead]
    lines = [
        [f"{row['step']:.0f}", *(number(row.get(f"extra/{key}")) for key in COLUMNS), number(ahead.get(row["step"])),
         number(row.get("learning_rate"))]
        for row in told
    ]  # fmt: skip
    head = ["step", *(key.replace("_", " ") for key in COLUMNS), "steps jumped", "learning rate"]
    return (
        f"<section><details><summary>All {len(told)} logs of cycles</summary>{_table(head, lines)}</details></section>"
    )


def _memory(summary: dict[str, Any]) -> str:
    kinds = summary["bytes_per_parameter"]
    if not kinds:
        return ""
    lines = [[escape(key), f"{size:.2f}"] for key, size in kinds.items()] + [["all", f"{sum(kinds.values()):.2f}"]]
    says = (
        f"Bytes per parameter, of {summary['parameters']:,}, beside weights and gradients, in the checkpoint's "
        "optimizer.pt. AdamW keeps exp_avg and exp_avg_sq; ExtraAdam adds extra_anchor and extra_estimate."
    )
    return f"<section><h2>The optimizer's memory</h2><p>{says}</p>{_table(['state', 'bytes'], lines)}</section>"


def html(run: Run, summary: dict[str, Any]) -> str:
    """The page: one string, the same for the same run.

    Args:
        run: of :func:`extraopt.tools.report.read_run`.
        summary: of :func:`extraopt.tools.report.summarize`.
    """
    charts, found = _charts(run, summary), ends(run)
    facts = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>\n" for name, value in _facts(summary))
    said = [f"<p>{escape(words)}</p>" for words in summary["verdict"]]
    said += [f'<p class="warn"><strong>Warning:</strong> {escape(words)}</p>' for words in summary["warnings"]]
    said += [f'<p class="soft">Note: {escape(words)}</p>' for words in summary["notes"]]
    if left_out := [key for key in summary["metrics"] if key not in _drawn(summary)]:
        said.append(f'<p class="soft">Not drawn: {escape(", ".join(left_out[:20]))}.</p>')
    key = '<p class="key soft"><span><i></i>a jump; stronger: gate further open</span>'
    key += '<span><i class="r"></i>tensors refused</span></p>'
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>ExtraAdam in {escape(run.name)}</title><style>{STYLE}</style></head><body><main>
<h1>ExtraAdam in {escape(run.name)}</h1>
<dl>{facts}</dl>
<section><h2>What the logs say</h2>{"".join(said)}</section>
<section>{key if found else ""}<div class="charts">{"".join(charts)}</div></section>
{_memory(summary)}{_cycles(found, run.rows) if found else ""}
</main></body></html>
"""


def write(page: str, out: Path) -> None:
    """Write a page, atomically; one that is there is replaced.

    Raises:
        CheckpointError: it can't be written.
    """
    beside = out.with_name(f".{out.name}.{os.getpid()}.unfinished")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(page, encoding="utf-8")
        os.replace(beside, out)
    except OSError as error:
        raise CheckpointError(f"{out} can not be written: {error.strerror}") from error
    finally:
        if beside.exists():
            beside.unlink()
