"""What makes pages that are right on GitHub right on the site: called by mkdocs for every page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(((?:\.\./)+[^)]+|CONTRIBUTING\.md|examples)\)")


def on_page_markdown(markdown: str, *, page: Any, **others: Any) -> str:
    """The README as the front page, and the text of links that lead out of docs/, which a site has no pages for."""
    folder = ROOT / "docs"
    if page.file.src_uri == "index.md":
        markdown = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")

    def inside(found: re.Match[str]) -> str:
        target = (folder / page.file.src_uri).parent / found[2].partition("#")[0]
        return found[0] if target.resolve().is_relative_to(folder) and target.exists() else found[1]

    return LINK.sub(inside, markdown)
