"""The built pages in a browser: light and dark, on a desk and on a phone. Skips without Sphinx and Chromium."""

from __future__ import annotations

import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from html import unescape
from pathlib import Path

import pytest
from _pages import ROOT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DESK, PHONE = 1200, 390

LOOK = """
function look(frame) {
  const page = frame.contentDocument, root = page.documentElement;
  return {page: frame.dataset.page, width: root.clientWidth, needs: root.scrollWidth,
    bg: frame.contentWindow.getComputedStyle(page.body).backgroundColor, letters: page.body.innerText.length,
    broken: [...page.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)};
}
window.onload = () => { document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(look)); };
"""


class Server(http.server.SimpleHTTPRequestHandler):
    """Files of a folder, to this machine alone; remembers what was asked for in vain."""

    missing: list[str] = []

    def log_message(self, format: str, *values: object) -> None:
        if len(values) > 1 and str(values[1]).startswith("4"):
            self.missing.append(str(values[0]))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """The pages, and where they are served."""
    for name in "sphinx", "myst_parser", "pydata_sphinx_theme", "latex2mathml":
        pytest.importorskip(name, reason=f"needs {name}: pip install 'extraopt[docs]'")
    out = tmp_path_factory.mktemp("docs")
    build = [sys.executable, "-m", "sphinx", "-q", "-b", "html", "-d", str(out / "doctrees"), str(ROOT / "docs")]
    subprocess.run([*build, str(out / "html")], check=True)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Server, directory=str(out / "html")))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield out / "html", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium: apt-get install chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_each_page_fits_a_desk_and_a_phone(scheme: str, built: tuple[Path, str], tmp_path: Path) -> None:
    folder, address = built
    pages = sorted(page.name for page in folder.glob("*.html") if not page.name.startswith("_"))
    frames = "".join(
        f'<iframe src="{page}" data-page="{page}" style="width:{width}px;height:900px;border:0"></iframe>'
        for page in pages
        for width in (DESK, PHONE)
    )
    (folder / "_frames.html").write_text(
        f"<!DOCTYPE html><meta charset=utf-8><body>{frames}<script>{LOOK}</script></body>"
    )
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'profile'}", f"--blink-settings=preferredColorScheme={int(scheme == 'light')}",
        "--virtual-time-budget=20000", "--dump-dom", f"{address}/_frames.html",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr
    seen = json.loads(unescape(title[1]))
    assert len(seen) == 2 * len(pages) and {look["width"] for look in seen} == {DESK, PHONE}
    assert [look for look in seen if look["needs"] > look["width"] or look["broken"] or look["letters"] < 50] == []
    for look in seen:
        light = sum(map(int, re.findall(r"\d+", look["bg"])[:3])) > 380
        assert light == (scheme == "light"), look
    assert [asked for asked in Server.missing if "favicon" not in asked] == []
