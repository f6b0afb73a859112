"""The versions that the package asks for are those that its tests ran with."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def compatibility() -> Any:
    spec = importlib.util.spec_from_file_location("compatibility", ROOT / "benchmarks" / "compatibility.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_rows_of_the_result(compatibility: Any) -> None:
    rows = json.loads(compatibility.RESULT.read_text())["rows"]
    text = compatibility.PAGE.read_text().partition(compatibility.BEGIN)[2].partition(compatibility.END)[0]
    assert text.strip() == compatibility.table(rows)


def test_the_lower_bounds_are_the_lowest_versions_that_were_tested(compatibility: Any) -> None:
    rows = json.loads(compatibility.RESULT.read_text())["rows"]
    asked = (ROOT / "pyproject.toml").read_text()
    for name in "torch", "triton":
        bound = [int(part) for part in re.search(rf'"{name}>=([\d.]+)', asked)[1].split(".")]
        lowest = min([int(part) for part in row[name].partition("+")[0].split(".")] for row in rows)
        assert bound == lowest[: len(bound)], name


def test_a_row_counts_what_junit_files_say(compatibility: Any, tmp_path: Path) -> None:
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite errors="1" failures="2" skipped="3" tests="10" timestamp="2026-01-02T03:04:05"/>'
        "</testsuites>"
    )
    row = compatibility.row([report])
    assert (row["passed"], row["skipped"], row["failed"], row["date"]) == (4, 3, 3, "2026-01-02")
