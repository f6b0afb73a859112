"""The page of `extraopt report` in a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'extraopt[cli]'")

from _report_page import cycles, jsonl, page_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

LOOK = """
const all = [...document.querySelectorAll("iframe")];
function look(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, root = page.documentElement;
  page.querySelectorAll("details").forEach(d => d.open = true);
  const color = (e, key) => view.getComputedStyle(e)[key];
  const texts = [...page.querySelectorAll("svg text")].map(t => t.getBoundingClientRect());
  const svgs = [...page.querySelectorAll("svg")].map(s => s.getBoundingClientRect());
  return {width: root.clientWidth, needs: root.scrollWidth, bg: color(page.body, "backgroundColor"),
    ink: color(page.body, "color"), warn: color(page.querySelector(".warn"), "color"),
    svg: color(page.querySelector("svg text"), "fill"), smallest: Math.min(...texts.map(t => t.height)),
    columns: new Set(svgs.map(s => Math.round(s.left))).size, sticks_out: svgs.some(s => s.right > root.clientWidth),
    ratio: Math.min(...svgs.map(s => s.height / s.width))};
}
window.onload = () => { document.title = JSON.stringify(all.map(look)); };
"""


def contrast(one: str, two: str) -> float:
    """WCAG's, of two CSS colours."""

    def light(color: str) -> float:
        parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(two)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_browser_shows_it_on_a_desk_and_on_a_phone(scheme: str, tmp_path: Path):
    name = "r" * 90
    logs = [log | {"eval_" + "w" * 90: 1.0} for log in cycles(count=45, **{"extra/refused": 1})]
    jsonl(tmp_path / name, logs)
    page = escape(page_of(tmp_path / name, ahead=40))
    frames = "".join(
        f'<iframe srcdoc="{page}" style="width:{w}px;height:900px;border:0"></iframe>' for w in (1200, 390)
    )
    file = tmp_path / "frames.html"
    file.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}<script>{LOOK}</script></body>")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--blink-settings=preferredColorScheme={int(scheme == 'light')}", "--virtual-time-budget=5000", "--dump-dom",
        file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    desk, phone = json.loads(unescape(re.search(r"<title>(.*?)</title>", done.stdout)[1]))
    for seen in (desk, phone):
        assert seen["needs"] <= seen["width"] and not seen["sticks_out"], "no scrolling sideways"
        assert contrast(seen["bg"], "rgb(255, 255, 255)" if scheme == "light" else "rgb(0, 0, 0)") < 1.3
        assert min(contrast(seen["bg"], seen[what]) for what in ("ink", "svg", "warn")) > 4.5
        assert seen["smallest"] > 9 and seen["ratio"] > 0.5
    assert (desk["width"], desk["columns"]) == (1200, 2) and (phone["width"], phone["columns"]) == (390, 1)
