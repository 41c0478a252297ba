"""The page of commands, docs/cli.md, made from what `--help` says.

    python docs/tools/cli_page.py            # write it
    python docs/tools/cli_page.py --check    # fail where it says something else

Needs the packages of a device only: the commands import torch inside their bodies.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "exporters"), str(ROOT / "runtime")]

from edgemoe.cli import main as edgemoe  # noqa: E402 (found on the path above)

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = ROOT / "docs" / "cli.md"
WIDTH = 88
HEAD = """\
<!-- Made by docs/tools/cli_page.py from --help. Do not edit: run the script. -->

# Commands

What `edgemoe COMMAND --help` prints. [From a checkpoint to a bundle](guides/pipeline.md) says
which command is for what. Every command prints text for people, or one JSON object (`--json`);
progress and diagnostics go to stderr; it exits with 0 when done, 1 when it refused or failed, 2
when it was called wrongly.
"""


def sections() -> Iterator[tuple[str, str]]:
    """Yield each command's name and help, the group first, wrapped at a fixed width."""
    group = _context(edgemoe, "edgemoe")
    yield "edgemoe", edgemoe.get_help(group)
    for name in edgemoe.list_commands(group):
        command = edgemoe.get_command(group, name)
        if command is None:
            raise LookupError(f"edgemoe lists the command {name}, got none of that name.")
        yield f"edgemoe {name}", command.get_help(_context(command, name, group))


def _context(
    command: click.Command, name: str, parent: click.Context | None = None
) -> click.Context:
    width = {"terminal_width": WIDTH, "max_content_width": WIDTH}
    settings = {**command.context_settings, **width}
    return click.Context(command, info_name=name, parent=parent, **settings)


def render() -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name, text in sections():
        shown = "\n".join(line.rstrip() for line in text.splitlines())
        parts.append(f"## {name}\n\n```text\n{shown}\n```\n")
    return "\n".join(parts)


def main() -> None:
    """Write the page, or check it."""
    text = render()
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        sys.exit(f"{PAGE} must say what --help says. Run: python {Path(__file__).name}")


if __name__ == "__main__":
    main()
