"""Each relative link of a page leads to a file that git has, and each anchor to a heading."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from _pages import PAGES, ROOT, anchors, links, name, read


@pytest.fixture(scope="module")
def tracked() -> set[str]:
    """Files of the repository and the folders that hold them; new files count, ignored ones don't."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    files = [Path(line) for line in listed.splitlines() if (ROOT / line).exists()]
    return {path.as_posix() for file in files for path in (file, *file.parents)}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_each_link_leads_to_a_file_and_a_heading(page: Path, tracked: set[str]) -> None:
    broken = []
    for link in links(read(page)):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        if not file.is_relative_to(ROOT) or name(file) not in tracked:
            broken.append(link)
        elif anchor and (file.suffix != ".md" or anchor not in anchors(read(file))):
            broken.append(link)
    assert broken == []


def test_each_page_is_in_a_table_of_contents() -> None:
    listed = {"index"}
    for page in (ROOT / "docs").glob("*.md"):
        for block in read(page).split("```{toctree}")[1:]:
            lines = [line.strip() for line in block.partition("```")[0].splitlines()]
            entries = [line for line in lines if line and not line.startswith(":")]
            listed |= {entry.partition("<")[2].rstrip(">") or entry for entry in entries}
    assert listed == {page.stem for page in (ROOT / "docs").iterdir() if page.suffix in (".md", ".rst")}


def test_anchors_are_named_as_github_names_them() -> None:
    text = "# One\n\n## `f(x)` and [the rest](a.md)\n\n```\n# no heading\n```\n\n## One\n"
    assert anchors(text) == {"one", "fx-and-the-rest", "one-1"}


LARGE = {f"benchmarks/results/{name}.json" for name in ("rlvr", "grpo_llm")}  # a row for each of hundreds of runs
MOST = 300_000  # bytes


def test_files_are_small_but_for_those_that_are_named_here(tracked: set[str]) -> None:
    sizes = {path: (ROOT / path).stat().st_size for path in tracked if (ROOT / path).is_file()}
    assert {path for path, size in sizes.items() if size > MOST} <= LARGE


def test_each_picture_is_shown_by_a_page(tracked: set[str]) -> None:
    pages = [*PAGES, *map(ROOT.joinpath, (path for path in tracked if path.endswith(".md")))]
    shown = {(page.parent / link.partition("#")[0]).resolve() for page in pages for link in links(read(page))}
    pictures = {ROOT / path for path in tracked if Path(path).suffix in {".png", ".svg", ".gif"}}
    assert {path.relative_to(ROOT).as_posix() for path in pictures - shown} == set()


def test_the_readme_is_read_in_five_minutes() -> None:
    assert len(read(ROOT / "README.md").split()) <= 1500
