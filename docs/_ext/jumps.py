"""The directive `jumps`: what the ends of the cycles of one measured run were like, drawn from its committed result.

    ```{jumps}
    :optimizer: ExtraAdam
    :lr: 1e-6
    :seed: 0
    :precision: fp32
    :show: length, kl, fall, gate
    ```

Drawn when the pages are built, so that a picture can't be of another run than the file has. Text and lines take the
colour of the page: light or dark.
"""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import directives
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from extraopt.hyperparameters import DEFAULTS

RESULT = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "grpo_llm.json"
# a column of a jump in the file, what it is called, its limit: runs of "ExtraAdam" there are by the defaults
COLUMNS: dict[str, tuple[int, str, float | None]] = {
    "coherence": (1, "extra/coherence", None),
    "gate": (2, "extra/gate", None),
    "length": (3, "extra/length", None),
    "kl": (4, "extra/kl", DEFAULTS["extra_kl"]),
    "fall": (5, "extra/fall", DEFAULTS["extra_fall"]),
}
WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 300, 150, 44, 24, 22


def chart(key: str, steps: list[float], values: list[float | None]) -> str:
    """One value over the steps of a run, as SVG."""
    _, name, limit = COLUMNS[key]
    known = [value for value in values if value is not None]
    highest = max([*known, limit or 0.0, 1.0 if key in ("gate", "coherence") else 0.0]) * 1.08
    lowest = min([*known, 0.0])

    def at(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 8) * step / max(steps)
        y = TOP + (HEIGHT - TOP - BOTTOM) * (highest - value) / (highest - lowest)
        return round(x, 1), round(y, 1)

    points = [at(step, value) for step, value in zip(steps, values) if value is not None]
    (x0, y0), (x1, _) = at(0, lowest), at(max(steps), lowest)
    parts = [
        f'<line x1="{x0}" y1="{y0}" x2="{x1}" y2="{y0}" class="axis"/>',
        f'<text x="{LEFT}" y="14" class="name">{name}</text>',
        f'<text x="{x1}" y="{HEIGHT - 6}" text-anchor="end">step {max(steps):g}</text>',
        f'<text x="{LEFT - 5}" y="{y0}" text-anchor="end">{lowest:.2g}</text>',
        f'<text x="{LEFT - 5}" y="{min(at(0, max(known))[1] + 4, y0 - 13)}" text-anchor="end">{max(known):.3g}</text>',
        f'<polyline points="{" ".join(f"{x},{y}" for x, y in points)}"/>',
        *(f'<circle cx="{x}" cy="{y}" r="2.5"/>' for x, y in points),
    ]
    if limit is not None:
        y = at(0, limit)[1]
        parts.append(f'<line x1="{x0}" y1="{y}" x2="{x1}" y2="{y}" class="limit"/>')
        parts.append(f'<text x="{x1}" y="{y - 4}" text-anchor="end">limit {limit:g}</text>')
    told = ", ".join(f"{step:g}: {value:g}" for step, value in zip(steps, values) if value is not None)
    label = escape(f"{name} by step: {told}", quote=True)
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'


class Jumps(SphinxDirective):
    """Charts of one run, beside each other where there is room."""

    option_spec = {key: directives.unchanged_required for key in ("optimizer", "lr", "seed", "precision", "show")}

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(str(RESULT))
        wanted = self.options
        runs: list[dict[str, Any]] = [
            run
            for run in json.loads(RESULT.read_text(encoding="utf-8"))
            if run["optimizer"] == wanted["optimizer"]
            and run["lr"] == float(wanted["lr"])
            and run["seed"] == int(wanted["seed"])
            and run["settings"].get("precision") == wanted["precision"]
            and run["tuning"] == "full"
        ]
        if len(runs) != 1:
            raise self.error(f"{RESULT.name} has {len(runs)} such runs: {dict(wanted)}")
        jumps = runs[0]["jumps"]
        steps = [float(jump[0]) for jump in jumps]
        shown = [name.strip() for name in wanted["show"].split(",")]
        charts = [chart(key, steps, [jump[COLUMNS[key][0]] for jump in jumps]) for key in shown]
        return [nodes.raw("", f'<div class="jumps">{"".join(charts)}</div>', format="html")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("jumps", Jumps)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
