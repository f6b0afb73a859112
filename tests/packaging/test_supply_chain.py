"""What is installed along with us: each thing for a reason that is written down, and in tests at an exact version."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # the tests' own tools bring it there
    tomllib = pytest.importorskip("tomli", reason="Python 3.10 has no tomllib: pip install tomli")

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def plain(name: str) -> str:
    """A package's name as the index compares them."""
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    return plain(re.match(r"[\w.-]+", requirement)[0])


def declared() -> dict[str, set[str]]:
    """Packages by where they are declared: "" for what everyone gets, else the extra."""
    lists = {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    return {where: {name_of(r) for r in found} - {"extraopt"} for where, found in lists.items()}


def every() -> set[str]:
    return set().union(*declared().values())


def test_a_dependency_is_there_without_a_reason():
    _, heading, rest = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8").partition("\n## Dependencies\n")
    assert heading, "docs/reliability.md has no section on dependencies"
    section = rest.partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in section.splitlines() if "|" in line]
    reasons = {plain(name): row[-1] for row in rows[2:] for name in re.findall(r"`([\w.-]+)`", row[0])}
    assert {name for name in every() if len(reasons.get(name, "")) < 10} == set()
    assert reasons.keys() - every() == set(), "told of, but no longer declared"


def test_a_module_of_ours_imports_what_is_not_declared():
    undeclared = set()
    for file in [*(ROOT / "extraopt").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                modules = [node.module or ""]
            for module in {module.partition(".")[0] for module in modules} - sys.stdlib_module_names - {"extraopt"}:
                if plain(module) not in every():
                    undeclared.add((file.name, module))
    assert undeclared == set()


def test_a_dependency_of_the_tests_is_not_pinned():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {name_of(line) for line in lines if re.match(r"[\w.-]+==\S+", line)}
    assert every() - pinned == set()


def test_what_everyone_gets_is_more_than_torch_and_triton():
    assert declared()[""] == {"torch", "triton"}
