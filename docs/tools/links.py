"""Links of every Markdown page: files, anchors and images exist. Without a network.

    python docs/tools/links.py

Sphinx checks the pages of the site as well; this reads the pages that are no part of it, too
(README, CONTRIBUTING, CHANGELOG, README of the packages), and as a git host shows them.
"""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from markdown_it import MarkdownIt

if TYPE_CHECKING:
    from collections.abc import Iterator

    from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = (
    "*.md", "docs/**/*.md", "runtime/*.md", "exporters/*.md", "examples/**/*.md",
    "benchmarks/**/*.md", "findings/**/*.md",
)  # fmt: skip


def pages() -> list[Path]:
    """List the pages, those that are generated left out."""
    found = {page for pattern in PAGES for page in ROOT.glob(pattern)}
    return sorted(page for page in found if "_generated" not in page.parts)


def links(page: Path) -> Iterator[tuple[int, str]]:
    """Yield the line and target of every link and image of a page, not those in code."""
    for token in MarkdownIt("commonmark").enable("table").parse(page.read_text("utf-8")):
        line = token.map[0] + 1 if token.map else 0
        for child in _flat(token.children or []):
            target = child.attrs.get("href") or child.attrs.get("src")
            if target:
                yield line, str(target)


def _flat(tokens: list[Token]) -> Iterator[Token]:
    for token in tokens:
        yield token
        yield from _flat(token.children or [])


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as git hosts and MyST make them."""
    found: set[str] = set()
    tokens = MarkdownIt("commonmark").parse(page.read_text("utf-8"))
    for opening, inline in itertools.pairwise(tokens):
        if opening.type != "heading_open":
            continue
        text = "".join(child.content for child in inline.children or [] if child.type in _TEXT)
        slug = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        number = 0
        while (anchor := slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(anchor)
    return found


_TEXT = ("text", "code_inline")


def broken(page: Path) -> Iterator[str]:
    """Yield what is wrong with a page's links."""
    for line, target in links(page):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = unquote(target).partition("#")
        file = (page.parent / path).resolve() if path else page
        where = f"{page.relative_to(ROOT)}:{line}: {target}"
        if not file.exists():
            yield f"{where}: there is no such file"
        elif ROOT not in (file, *file.parents):
            yield f"{where}: it leaves the repository"
        elif anchor and file.suffix == ".md" and not _has(file, anchor):
            yield f"{where}: there is no such heading"


def _has(file: Path, anchor: str) -> bool:
    # The page of the API is made from sources; Sphinx checks its anchors.
    return file.name == "api.md" or anchor in anchors(file)


def main() -> None:
    """Check all pages."""
    found = [problem for page in pages() for problem in broken(page)]
    if found:
        sys.exit("\n".join([*found, f"{len(found)} broken links."]))
    print(f"{len(pages())} pages, no broken link.")


if __name__ == "__main__":
    main()
