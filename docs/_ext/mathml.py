"""Formulas as MathML, which browsers draw by themselves: the pages need no script and no fonts from elsewhere."""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx


def to_mathml(tex: str) -> str:
    """MathML of one line."""
    tex = re.sub(r"\\bf\s*\{", r"\\textbf{", tex).replace("&", "")
    # the converter has no names of operators: it would set each letter apart
    tex = re.sub(r"\\(?:mathrm|operatorname)\{(\w+)\}", r"\\text{\1}", tex)
    made = convert(tex).replace(r"\_", "_")
    # single letters are set in italics by the style sheet: browsers' own would need a mathematical font
    made = re.sub(r"<mi>(\w{2,})</mi>", r'<mi class="word">\1</mi>', made)
    return made.replace('<mtext mathvariant="bold">', '<mtext class="bold">')


def to_lines(tex: str) -> list[str]:
    """The lines of a formula; those that only draw a rule are left out."""
    tex = re.sub(r"\\(begin|end)\{aligned\}", "", tex)
    tex = re.sub(r"\\rule\{[^}]*\}\{[^}]*\}", "", tex)
    lines = re.split(r"\\\\(?:\s*\[[^\]]*\])?", " ".join(tex.split()))
    return [line.strip() for line in lines if line.strip(" &")]


def visit_math(self: Any, node: nodes.math) -> None:
    self.body.append(to_mathml(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self: Any, node: nodes.math_block) -> None:
    lines = "".join(f"<div>{to_mathml(line)}</div>" for line in to_lines(node.astext()))
    self.body.append(f'<div class="math-block">{lines}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
