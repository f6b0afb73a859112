"""Logs to make a page of, and a reader that takes it apart."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from extraopt.tools.page import html
from extraopt.tools.report import read_run, summarize

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Fails on a tag that is not closed; keeps tags, texts and attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data.strip())

    def facts(self) -> dict[str, str]:
        words = [word for word in self.words if word]
        start, stop = words.index("steps"), words.index("What the logs say")
        return dict(zip(words[start:stop:2], words[start + 1 : stop : 2]))

    def rows(self) -> list[list[str]]:
        words = [word for word in self.words if word]
        cells = words[words.index("learning rate") + 1 :]
        return [cells[i : i + 11] for i in range(0, len(cells), 11)]


def svgs(page: str) -> list[ElementTree.Element]:
    return [ElementTree.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.S)]


def page_of(path: Path, **options: Any) -> str:
    run = read_run(path, **options)
    return html(run, summarize(run))


def cycles(count: int = 12, every: int = 10, **of: Any) -> list[dict[str, Any]]:
    """Logs of each step, with a cycle every `every` steps: gates rise by 0.1 from 0 and fall back."""
    logs = []
    for step in range(1, count * every + 1):
        logs.append({"step": step, "loss": 2 - step / 100, "reward": step / 200, "learning_rate": 1e-5})
        if step % every == 0:
            gate = (step // every - 1) % 10 / 10
            logs[-1] |= {"extra/gate": gate, "extra/coherence": gate / 2, "extra/drift_norm": 0.01}
            logs[-1] |= {"extra/jumped": 5 * (gate > 0), "extra/refused": 0, **of}
    return logs


def jsonl(folder: Path, logs: list[dict[str, Any]], name: str = "log.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("".join(json.dumps(log) + "\n" for log in logs))
    return folder / name
