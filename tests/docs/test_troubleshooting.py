"""Each error and warning that docs/troubleshooting.md names is one that the code can raise."""

from __future__ import annotations

import ast
import re

import pytest
from _pages import ROOT, read

PAGE = ROOT / "docs" / "troubleshooting.md"
GAP = "\0"  # what is filled in


def texts() -> list[str]:
    """The strings of our sources, with a gap for each value in an f-string; what is added up counts as one."""

    def text(node: ast.AST) -> str:
        if isinstance(node, ast.Constant):
            return node.value if isinstance(node.value, str) else GAP
        if isinstance(node, ast.JoinedStr):
            return "".join(map(text, node.values))
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return text(node.left) + text(node.right)
        return GAP

    files = [*(ROOT / "extraopt").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    trees = [ast.parse(read(file)) for file in files]
    docs = {id(first) for tree in trees for node in ast.walk(tree) for first in docstrings(node)}
    kinds = ast.Constant, ast.JoinedStr, ast.BinOp
    found = [
        text(node) for tree in trees for node in ast.walk(tree) if isinstance(node, kinds) and id(node) not in docs
    ]
    return [re.sub(r"%[dsr]", GAP, words) for words in found if len(words) > 8]


def docstrings(node: ast.AST) -> list[ast.AST]:
    """The docstring's node, if it has one: what it tells of an error raises none."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    first = node.body[0] if isinstance(node, kinds) and node.body else None
    return [first.value] if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) else []


def messages() -> list[str]:
    """The left column of the tables whose head says that it holds messages."""
    found = []
    for table in re.findall(r"^\| message \|.*\n\|[-|]+\n((?:\|.*\n)+)", read(PAGE), re.M):
        found += [row.split(" | ")[0].removeprefix("| ") for row in table.splitlines()]
    return [re.match(r"(`+) ?(.+?) ?\1", cell)[2] for cell in found]


@pytest.fixture(scope="module")
def raised() -> list[str]:
    return texts()


@pytest.mark.parametrize("message", messages())
def test_the_code_raises_each_message(message: str, raised: list[str]) -> None:
    parts = [re.escape(part.strip(" ")) for part in message.split("...")]
    pattern = re.compile(rf".*?{GAP}.*?".join(parts), re.S)
    assert any(pattern.search(text) for text in raised)


def test_the_page_has_what_people_meet() -> None:
    assert len(messages()) > 40
