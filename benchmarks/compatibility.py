"""Versions of Python, torch and Triton that the tests of the optimizer and the kernels ran with, and how they went.

    make test-torch VERSION=2.9.1                # runs the tests, and this script on what they report: adds a row
    python benchmarks/compatibility.py --page    # the table, printed and written into docs/reliability.md

Given JUnit files, it must be run by the Python that ran their tests: it is asked for the versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "compatibility.json"
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- made by benchmarks/compatibility.py -->", "<!-- end of compatibility -->"


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def row(reports: list[Path]) -> dict[str, Any]:
    """What the JUnit files say, with the versions of the Python that runs this."""
    suites = [suite for report in reports for suite in ElementTree.parse(report).iter("testsuite")]
    total, failures, errors, skipped = (
        sum(int(suite.get(key, 0)) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    changed = git("status", "--porcelain", "--", "extraopt", "kernels", "tests")
    return {
        "python": platform.python_version(),
        "torch": version("torch"),
        "triton": version("triton"),
        "passed": total - failures - errors - skipped,
        "skipped": skipped,
        "failed": failures + errors,
        "date": max(suite.get("timestamp", "")[:10] for suite in suites),
        "commit": git("rev-parse", "--short=10", "HEAD") + ("+changes" if changed else ""),
    }


def key(row: dict[str, Any]) -> tuple[list[int], list[int]]:
    torch, python = (row[name].partition("+")[0].split(".") for name in ("torch", "python"))
    return [int(part) for part in torch], [int(part) for part in python[:2]]


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row of the result."""
    lines = ["| torch | triton | Python | passed | skipped | failed |", "|---|---|---|---|---|---|"]
    for r in rows:
        names = "torch", "triton", "python", "passed", "skipped", "failed"
        lines.append(f"| {' | '.join(str(r[name]) for name in names)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", nargs="*", type=Path, help="JUnit files of one run: a row for it")
    parser.add_argument("--page", action="store_true", help="write the table into docs/reliability.md")
    options = parser.parse_args()

    rows = json.loads(RESULT.read_text())["rows"] if RESULT.exists() else []
    if options.reports:
        new = row(options.reports)
        rows = sorted([new, *(old for old in rows if key(old) != key(new))], key=key)
        lines = ",\n".join("  " + json.dumps(each) for each in rows)
        RESULT.write_text(f'{{\n "tests": "tests/optimizer, tests/kernels",\n "rows": [\n{lines}\n ]\n}}\n')
    if options.page:
        before, begin, rest = PAGE.read_text().partition(BEGIN)
        if not begin:
            raise SystemExit(f"{PAGE} has no {BEGIN}")
        PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{rest.partition(END)[2]}")
    print(table(rows))


if __name__ == "__main__":
    main()
