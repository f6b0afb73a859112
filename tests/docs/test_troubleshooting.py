"""Each error and warning that docs/troubleshooting.md names is one that the code can raise, and it has each warning."""

from __future__ import annotations

import ast
import re
from itertools import product

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


def variants(node: ast.AST) -> list[str]:
    """What a string can be, with a gap for each value that is not written there."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    if isinstance(node, ast.JoinedStr):
        return ["".join(parts) for parts in product(*map(variants, node.values))]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return ["".join(parts) for parts in product(variants(node.left), variants(node.right))]
    if isinstance(node, ast.IfExp):
        return variants(node.body) + variants(node.orelse)
    if isinstance(node, ast.BoolOp):
        return [text for value in node.values for text in variants(value)]
    return [GAP]


def warned() -> list[str]:
    """The texts of our warnings, and what they give as the reason why there is no trust region."""
    said = list[ast.AST]()
    for file in (*(ROOT / "extraopt").rglob("*.py"), *(ROOT / "kernels").glob("*.py")):
        for node in ast.walk(ast.parse(read(file))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                said += node.args[: 2 if name == "_warn" else 1] if name in ("warn", "_warn", "Unusable") else []
            elif isinstance(node, ast.FunctionDef) and node.name == "_not_found":
                said += [part.value for part in ast.walk(node) if isinstance(part, ast.Return) and part.value]
            elif isinstance(node, ast.Assign) and any(getattr(of, "attr", "") == "refused" for of in node.targets):
                said.append(node.value)
    found = [text for node in said for text in variants(node)]
    return sorted({text for text in found if " " in text.replace(GAP, "").removeprefix("extraopt: ")})


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


def pattern(message: str) -> re.Pattern[str]:
    parts = [re.escape(part.strip(" ")) for part in message.split("...")]
    return re.compile(rf".*?{GAP}.*?".join(parts), re.S)


@pytest.mark.parametrize("message", messages())
def test_the_code_raises_each_message(message: str, raised: list[str]) -> None:
    assert any(pattern(message).search(text) for text in raised)


@pytest.mark.parametrize("text", warned())
def test_the_page_has_each_warning(text: str) -> None:
    assert any(pattern(message).search(text) for message in messages()), text


def test_the_warnings_are_found() -> None:
    """By all ways that lead to one: at once, as a reason that is given on, or kept for later."""
    found = "\n".join(warned())
    for words in ("changed in mid-run", "TorchScript", "a cycle ended without", "has none of these", "no logits could"):
        assert words in found


def test_the_page_has_what_people_meet() -> None:
    assert len(messages()) > 40
