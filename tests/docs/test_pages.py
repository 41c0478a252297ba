"""Pages name commands, options and messages that exist, and the page of commands is --help."""

from __future__ import annotations

import ast
import re
import runpy
import shlex
import tempfile
from pathlib import Path

import pytest

from edgemoe.cli import main

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "docs").rglob("*.md")
    if "_generated" not in page.parts and page.name != "cli.md"
)


def calls(page: Path) -> list[str]:
    """Return the lines of a page's code that call `edgemoe`, continued lines joined."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    return re.findall(r"^ {4}(?:\$ )?(edgemoe [a-z].*)$", text, re.M)


def test_pages_call_commands() -> None:
    assert sum(len(calls(page)) for page in PAGES) >= 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_commands_and_options_that_exist(page: Path) -> None:
    for call in calls(page):
        name, *words = shlex.split(call, comments=True)[1:]
        assert name in main.commands, call
        known = {
            option for parameter in main.commands[name].params for option in parameter.opts
        }
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known | {"--help"}, call


def test_the_page_of_commands_is_what_help_says() -> None:
    made = runpy.run_path(str(ROOT / "docs/tools/cli_page.py"))["render"]()

    assert (ROOT / "docs/cli.md").read_text("utf-8") == made, "run docs/tools/cli_page.py"


def test_no_link_is_broken() -> None:
    tool = runpy.run_path(str(ROOT / "docs/tools/links.py"))

    assert [problem for page in tool["pages"]() for problem in tool["broken"](page)] == []


def test_a_broken_link_is_found() -> None:
    tool = runpy.run_path(str(ROOT / "docs/tools/links.py"))
    # Within the repository, which links must not leave, and where no page is looked for.
    (ROOT / "build").mkdir(exist_ok=True)
    text = "# A title\n\n[a](#a-title) [b](#b) [c](none.md) ![d](../../docs/index.md#none)\n"
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as folder:
        page = Path(folder) / "page.md"
        page.write_text(text, encoding="utf-8")
        found = list(tool["broken"](page))

    assert [problem.split(": ")[-2] for problem in found] == [
        "#b",
        "none.md",
        "../../docs/index.md#none",
    ]


def strings_of_the_code() -> str:
    """Return all string literals of the packages, adjacent and formatted ones joined."""
    found: list[str] = []
    for package in ("edgemoe", "exporters/edgemoe_exporters", "runtime/edgemoe_runtime"):
        for file in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    found.append(
                        "".join(
                            str(part.value) if isinstance(part, ast.Constant) else "…"
                            for part in node.values
                        )
                    )
    return "\n".join(found)


def test_messages_of_the_troubleshooting_page_are_in_the_code() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text("utf-8")
    quoted = re.findall(r"^> (.+)$", text, re.M)
    code = strings_of_the_code()

    assert len(quoted) >= 30
    for message in quoted:
        for piece in message.split("…"):
            assert piece.strip(" `") in code, (message, piece)
