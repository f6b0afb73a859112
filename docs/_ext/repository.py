"""Links to files outside docs/, which a reader of the repository follows: pages of ours, downloads, or folders' names.

And a last look at what was built: a page that would load anything from another host fails the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import SphinxError

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)#\s]*)(#[^)\s]*)?\)")
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
LOADS = re.compile(
    r"<(?:script|img|iframe|source|audio|video)\b[^>]*\bsrc=[\"'](?:https?:)?//[^>]*>"
    r"|<link\b(?=[^>]*\brel=[\"'](?:stylesheet|preload|icon|modulepreload|preconnect)[\"'])[^>]*href=[\"'](?:https?:)?//[^>]*>"
)


def follow(app: Sphinx, docname: str, source: list[str]) -> None:
    """Turn each link out of docs/ into what these pages have in its place."""
    root = Path(app.srcdir).parent

    def replace(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        file = Path(os.path.normpath(Path(app.srcdir) / docname)).parent / target
        name = Path(os.path.normpath(file)).relative_to(root).as_posix()
        if name in PAGES:
            return f"[{text}]({PAGES[name]}{anchor})"
        if file.is_dir():
            return text if text.strip("`") == name else f"{text} (`{name}`)"
        return f"{{download}}`{text.strip('`')} </../{name}>`"

    source[0] = LINK.sub(replace, source[0])


def look(app: Sphinx, exception: Exception | None) -> None:
    """Raise where a built page loads something from another host."""
    if exception is not None or app.builder.name != "html":
        return
    for page in Path(app.outdir).rglob("*.html"):
        if found := LOADS.search(page.read_text(encoding="utf-8")):
            raise SphinxError(f"{page.name} loads something from another host: {found[0][:200]}")
    for sheet in Path(app.outdir).rglob("*.css"):
        if found := re.search(r"(?:url\(|@import )\s*[\"']?(?:https?:)?//[^)]*", sheet.read_text(encoding="utf-8")):
            raise SphinxError(f"{sheet.name} loads something from another host: {found[0][:200]}")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", follow)
    app.connect("build-finished", look)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
