"""The files that GitHub and pre-commit read, against the Makefile, pyproject.toml and each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: pip install pyyaml")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def read(file: Path) -> Any:
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def steps(workflow: Any) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job.get("steps", [])]


def targets() -> dict[str, list[str]]:
    """Prerequisites by target."""
    return {name: needs.split() for name, needs in re.findall(r"^([\w-]+):(?!=)(.*)$", MAKEFILE, re.M)}


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_and_jobs_have_few_permissions(file: Path) -> None:
    workflow = read(file)
    used = [step["uses"] for step in steps(workflow) if "uses" in step]
    assert used and [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []
    assert workflow["permissions"] == {} and all("permissions" in job for job in workflow["jobs"].values())
    for step in steps(workflow):
        if step.get("uses", "").startswith("actions/checkout@"):
            assert step["with"]["persist-credentials"] is False
        assert "${{" not in step.get("run", ""), "what GitHub fills in goes through env"


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_workflows_make_targets_and_run_files_that_exist(file: Path) -> None:
    runs = [step["run"] for step in steps(read(file)) if "run" in step]
    assert set(re.findall(r"\bmake ([\w-]+)", " ".join(runs))) <= targets().keys()
    for path in re.findall(r"(?:\.ci|tests)/[\w./-]+", " ".join(runs)):
        assert (ROOT / path).is_file(), path


def test_all_pins_of_an_action_are_the_same() -> None:
    pins: dict[str, set[str]] = {}
    for file in WORKFLOWS:
        for name, pin in re.findall(r"uses: ([\w/-]+)@(.+)", file.read_text(encoding="utf-8")):
            pins.setdefault(name, set()).add(pin)
    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
    assert all(" # v" in pin for found in pins.values() for pin in found), "say which version a hash is"


def test_no_host_is_named_in_what_github_reads() -> None:
    files = [file for file in (ROOT / ".github").rglob("*") if file.is_file()] + [ROOT / ".pre-commit-config.yaml"]
    assert [(file.name, url) for file in files for url in re.findall(r"\w+://\S+|index-url", file.read_text())] == []


def test_the_tested_versions_are_the_promised_ones() -> None:
    promised = set(re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text()))
    tests, wheels = (read(ROOT / ".github" / "workflows" / name) for name in ("tests.yml", "wheels.yml"))
    matrix = tests["jobs"]["versions"]["strategy"]["matrix"]["include"]
    assert {entry["python"] for entry in matrix} == promised
    assert set(wheels["jobs"]["install"]["strategy"]["matrix"]["python"]) == promised
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d.]+)(?:\+cpu)? \| [\d.]+ \| (3\.\d+)\.\d+ \|", page, re.M)
    assert {(entry["torch"], entry["python"]) for entry in matrix} == set(rows)


def test_nothing_is_uploaded_before_the_tests_and_the_wheels() -> None:
    jobs = read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    (last,) = (job for job in jobs.values() if job.get("environment") == "pypi")
    files = {Path(jobs[need]["uses"]).name for need in last["needs"]}
    assert files == {"tests.yml", "wheels.yml"}
    for name in files:
        called = read(ROOT / ".github" / "workflows" / name)
        assert "workflow_call" in called.get("on", called.get(True)), "yaml reads a bare `on` as true"


def test_pre_commit_runs_what_make_lint_runs() -> None:
    (repo,) = read(ROOT / ".pre-commit-config.yaml")["repos"]
    assert [hook["entry"] for hook in repo["hooks"]] == [f"make {need}" for need in targets()["lint"]]


@pytest.mark.parametrize("name", ["bug_report", "run_report"])
def test_issue_forms_have_what_github_asks_of_them(name: str) -> None:
    form = read(ROOT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml")
    assert form["name"] and form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) and ids[0] == "environment"
    for field in form["body"]:
        assert field["type"] in {"textarea", "dropdown", "input"} and field["attributes"]["label"]
        assert all(type(option) is str for option in field["attributes"].get("options", [])), "yes and no are booleans"
