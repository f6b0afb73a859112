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

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..gate import NEWEST, averaged_noise, momentum_coherence, noise_floor, plain_noise, plain_weights
from ..hyperparameters import DEFAULTS
from .checkpoints import CheckpointError
from .plots import BLUE, GREEN, GREY, RED
from .report import MOST_MARKS, Ends, Run, ends, limits, value_or_0

INK, MOST_METRICS, MOST_LINES, FEW = "#1f2937", 5, 40, 50
COLORS = {INK: "ink", GREY: "soft", BLUE: "line", GREEN: "jump", RED: "warn"}  # drawn in these, shown as CSS variables
COLUMNS = ("length", "kl", "fall", "gate", "coherence", "drift_norm", "jumped", "refused")
MOST_CYCLES = 100_000  # that the gates' floor is followed through: some seconds
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


def _floors(of: dict[str, Any], found: list[Ends]) -> list[float]:
    """What momentum alone would show in each log, of a tensor whose gates were the logged ones.

    An open gate makes the estimate the newest drift, with which the next one agrees most; behind shut gates it becomes
    an average, with which noise agrees less.
    """
    every, beta, momentum = of["extra_every"], of["extra_beta"], of["momentum"]
    settled = min(10_000, math.ceil(10 / (1 - beta)))  # drifts beyond these change nothing
    cov, var = plain_noise(every, beta, momentum, min(settled, found[0].seen))  # before the log: as behind shut gates
    floors = list[float]()
    for e in found:
        gate = min(1.0, max(0.0, value_or_0(e.row, "extra/gate")))
        newest = torch.tensor([NEWEST * gate**2], dtype=torch.float64)
        shown = list[float]()
        for seen in range(e.seen, e.seen + max(1, min(e.count, settled, MOST_CYCLES // len(found)))):
            if seen:  # the first drift has no estimate to agree with
                shown.append(float(noise_floor(cov, var)))
            weights = torch.maximum(plain_weights(torch.tensor([seen]), beta), newest)
            cov, var = averaged_noise(cov, var, weights, every, momentum)
        floors.append(fmean(shown or [float(noise_floor(cov, var))]))
    return floors


def _levels(axes: Axes, run: Run, found: list[Ends]) -> None:
    """Coherence, and where the gates begin to open and are open, by the hyperparameters and the gates before."""
    axes.axhline(0, color=GREY, linewidth=0.8)
    if run.hyperparameters and run.hyperparameters["extra_gate"] is not None and found:
        gate, apart = run.hyperparameters["extra_gate"], len(found) // (FEW * 10) + 1
        low = _floors(run.hyperparameters, found)[::apart]
        steps = [e.row["step"] for e in found[::apart]]
        axes.plot(steps, low, color=GREY, linestyle="--", linewidth=1.3)
        axes.plot(steps, [c + gate * (1 - c) for c in low], color=GREEN, linestyle=":", linewidth=1.6)
    _series(axes, found, "coherence")
    axes.set_ylim(min(-0.1, axes.get_ylim()[0]), 1.05)


def _points(found: list[Ends], key: str) -> list[tuple[float, float]]:
    points = [(e.row["step"], e.row.get(f"extra/{key}", math.nan)) for e in found]
    return [point for point in points if math.isfinite(point[1])]


def _line(axes: Axes, points: list[tuple[float, float]], color: str = BLUE) -> None:
    few = len(points) <= MOST_LINES
    axes.plot([x for x, _ in points], [y for _, y in points], color=color, marker="o" if few else "", ms=3.5, lw=1.4)


def _series(axes: Axes, found: list[Ends], key: str) -> None:
    _line(axes, _points(found, key))


def _lengths(axes: Axes, found: list[Ends]) -> None:
    _series(axes, found, "length")
    _line(axes, [(e.row["step"], e.ahead / e.count) for e in found if e.ahead is not None], GREEN)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))


def _measured(axes: Axes, found: list[Ends], key: str, limit: float | None) -> None:
    """One dot for each jump that was measured, without lines across those that were not; and the limit."""
    points = _points(found, key)
    few = len(points) <= MOST_LINES
    points = points[:: 1 + len(points) // MOST_MARKS]
    x, y = [x for x, _ in points], [y for _, y in points]
    axes.plot(x, y, color=BLUE, marker="o", ms=3.5 if few else 2, linestyle="", clip_on=False)
    if limit is not None:
        axes.axhline(limit, color=RED, linestyle="--", linewidth=1.4)
    first, last = found[0].row["step"], found[-1].row["step"]  # as in the other charts, also where few of them jumped
    axes.set_xlim(first - 0.04 * (last - first) - 0.5, last + 0.04 * (last - first) + 0.5)
    axes.set_ylim(bottom=min([0.0, *y]))


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
    if any("extra/length" in e.row for e in found):
        says = (
            "Blue: how far an open gate jumped, in steps; 0: nothing jumped. Green: that times the gate, as far as the "
            "weights went. Behind shut gates a long jump moves little."
        )
        add("Length of the jumps", says, partial(_lengths, found=found))
    for key, title, what in (
        ("kl", "KL divergence of the outputs", "Mean KL divergence"),
        ("fall", "Fall in log-probability", "Mean largest fall of a plausible token's log-probability"),
    ):
        if _points(found, key):
            limit = limits(run).get(key)
            says = (
                f"{what} by each cycle, real steps and jump, in nats. No dot: nothing jumped, or nothing was measured."
            )
            says += "" if limit is None else f" Dashed: the limit, extra_{key} = {limit:g}."
            add(title, says, partial(_measured, found=found, key=key, limit=limit))
    says = (
        "How far the gates were open when a cycle ended, over all tensors: 0, none; 1, all, by the length "
        "that was chosen. The first cycle has no estimate to compare with."
    )
    add("Gate", says, partial(_gates, found=found))
    few, many = (momentum_coherence(DEFAULTS["extra_every"], DEFAULTS["extra_beta"], seen=seen) for seen in (1, 1000))
    levels = (
        f"Noise shows what momentum alone makes of it: by default {few:.2f} after a cycle with open gates, {many:.2f} "
        "after many with shut ones."
    )
    if run.hyperparameters and run.hyperparameters["extra_gate"] is not None:
        levels = (
            "Dashed: what momentum alone would show of a tensor with the gates logged so far, where its gate begins to "
            "open: more after open gates, less after shut ones. Dotted: where it is fully open."
        )
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
    facts += [("mean KL", number(of["mean_kl"], ".3g")), ("mean fall", number(of["mean_fall"], ".3g"))]
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


def _cycles(found: list[Ends], run: Run) -> str:
    ahead = {e.row["step"]: e.ahead for e in found}
    told = [row for row in run.rows if row["step"] in ahead]
    lines = [
        [f"{row['step']:.0f}", *(number(row.get(f"extra/{key}")) for key in COLUMNS), number(ahead.get(row["step"])),
         number(row.get("learning_rate"))]
        for row in told
    ]  # fmt: skip
    most = {key: f"{key} (limit {limit:g})" for key, limit in limits(run).items()}
    head = ["step", *(most.get(key, key.replace("_", " ")) for key in COLUMNS), "steps jumped", "learning rate"]
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
{_memory(summary)}{_cycles(found, run) if found else ""}
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
