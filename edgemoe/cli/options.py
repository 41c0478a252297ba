"""Options that several commands share, and how their results are printed."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Decorated = TypeVar("Decorated", bound="Callable[..., Any]")

# click's own existence check would exit 2; a missing file is a refusal, not a wrong call.
PATH = click.Path(path_type=Path)

_DEBUG = "edgemoe.debug"


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True
        warnings.simplefilter("default")


def debugging(ctx: click.Context) -> bool:
    """Return whether ``--debug`` was given to the group or to the command."""
    return bool(ctx.meta.get(_DEBUG, False))


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of a failure.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")


def output_option(what: str) -> Callable[[Decorated], Decorated]:
    """Return the ``-o`` option of a command that writes ``what``."""
    return click.option(
        "-o", "--output", type=PATH, required=True, metavar="PATH", help=f"{what} to write."
    )


def reporting(command: Decorated) -> Decorated:
    """Add the two options that every command has: ``--json`` and ``--debug``."""
    return json_option(debug_option(command))


def report(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result as one JSON object or as text for a person."""
    click.echo(json.dumps(result, ensure_ascii=False, default=str) if as_json else text)


def human_bytes(count: int) -> str:
    """Return a size in powers of ten, such as ``93.1 MB``."""
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def span(numbers: Sequence[int]) -> str:
    """Return one number, or the least and the largest, such as ``32 to 40``."""
    least, largest = min(numbers), max(numbers)
    return str(least) if least == largest else f"{least} to {largest}"
