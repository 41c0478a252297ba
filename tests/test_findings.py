"""The scripts of findings/ and the table that lists them; what they find is not run here."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "findings"
SCRIPTS = sorted(path.name for path in FOLDER.iterdir() if path.name != "README.md")
# | [script.sh](script.sh) | guess | actual | consequence |
ROW = re.compile(r"^\| \[([^]]+)\]\(([^)]+)\) \|(.+)\|$", re.M)


def rows() -> list[tuple[str, str, list[str]]]:
    found = ROW.findall((FOLDER / "README.md").read_text("utf-8"))
    # A bar inside code is escaped in Markdown.
    return [(name, link, re.split(r"(?<!\\)\|", cells)) for name, link, cells in found]


def test_every_script_has_one_row_and_every_row_a_script() -> None:
    names = [name for name, _, _ in rows()]
    assert names
    assert sorted(names) == SCRIPTS


def test_a_row_says_guess_actual_and_consequence() -> None:
    for name, link, cells in rows():
        assert link == name
        assert len(cells) == 3, name
        assert all(cell.strip() for cell in cells), name


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_valid_and_stops_at_the_first_failure(name: str) -> None:
    path = FOLDER / name
    assert path.suffix == ".sh"
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text("utf-8")
    assert text.startswith("#!/usr/bin/env bash\n# ")
    assert os.access(path, os.X_OK)
    assert re.search(r"^set -euo pipefail$", text, re.M)
    # What it shows is what versions do: they are pinned, in a folder that is removed again.
    assert re.search(r"[=@]=?\d", text)
    assert "mktemp -d" in text
