"""What commands share: options, examples in their help, and how their results are printed."""

from __future__ import annotations

import functools
import inspect
import json
import re
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from edgemoe.errors import ArgumentError
from edgemoe_runtime.messages import escape_controls

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

Decorated = TypeVar("Decorated", bound="Callable[..., Any]")

# click's own existence check would exit 2; a missing file is a refusal, not a wrong call.
PATH = click.Path(path_type=Path)

# Of a line that a shell continues; with the indent and the backslash it fits 80 columns.
_EXAMPLE_WIDTH = 76

_DEBUG = "edgemoe.debug"


class Command(click.Command):
    """A command whose help ends with examples.

    Attributes:
        examples: Command lines that can be typed as they are.
    """

    def __init__(self, *given: Any, examples: Sequence[str], **settings: Any) -> None:
        super().__init__(*given, **settings)
        self.examples = examples

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the command line, and refuse an option that is given twice and counts once.

        click itself takes the last one, so the others would be ignored in silence.
        """
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in {id(one): one for one in order}.values():
            if _counts_once(parameter) and (times := order.count(parameter)) > 1:
                raise click.UsageError(
                    f"{parameter.opts[-1]} must be given once, got it {times} times. Leave "
                    "all but one out, or run the command once for each.",
                    ctx,
                )
        return super().parse_args(ctx, args)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples below the options."""
        del ctx
        with formatter.section("Examples"):
            indent = " " * formatter.current_indent
            for example in self.examples:
                # An option and its value stay together.
                joined = re.sub(r"( -\S+) (?=[^-])", "\\1\N{NO-BREAK SPACE}", example)
                lines = textwrap.wrap(
                    joined, _EXAMPLE_WIDTH, subsequent_indent="    ", break_on_hyphens=False
                )
                text = indent + f" \\\n{indent}".join(lines) + "\n"
                formatter.write(text.replace("\N{NO-BREAK SPACE}", " "))


def _counts_once(parameter: click.Parameter) -> bool:
    """Return whether a second one would replace the first: not so for flags, said twice."""
    if not isinstance(parameter, click.Option) or parameter.multiple or parameter.count:
        return False
    return not parameter.is_flag or bool(parameter.secondary_opts)


def command(
    *examples: str, name: str | None = None
) -> Callable[[Callable[..., Any]], click.Command]:
    """Return the decorator that makes a function a command.

    Args:
        examples: Command lines that its help ends with.
        name: What it is called, where that is not the function's name.

    Returns:
        The decorator.
    """
    return click.command(name, cls=Command, examples=examples)


def options_of(verb: Callable[..., Any]) -> Callable[..., Callable[[Decorated], Decorated]]:
    """Return `click.option` for the parameters of a function of the API.

    An option is required where its parameter has no default, and has its default otherwise, so
    that neither is said twice.

    Args:
        verb: The function.

    Returns:
        A decorator as :func:`click.option` is, which refuses names that are no parameters.
    """
    parameters = inspect.signature(verb).parameters

    def option(*names: str, **settings: Any) -> Callable[[Decorated], Decorated]:
        made = click.Option(names)
        default = parameters[made.name or ""].default
        if default is inspect.Parameter.empty:
            settings.setdefault("required", True)
        elif default not in (None, ()) and "default" not in settings:
            listed = isinstance(default, tuple)
            settings["default"] = ",".join(map(str, default)) if listed else default
            settings.setdefault("show_default", not isinstance(default, bool))
        return click.option(*names, **settings)

    return option


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True
        warnings.simplefilter("default")


def debugging(ctx: click.Context) -> bool:
    """Return whether `--debug` was given to the group or to the command."""
    return bool(ctx.meta.get(_DEBUG, False))


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_remember_debug,
    help="Show the traceback of a failure.",
)

json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object instead of text."
)

force_option = click.option("--force", is_flag=True, help="Replace the output if it exists.")

THREADS = {
    "type": click.IntRange(1),
    "metavar": "N",
    "help": "CPU threads of each process; the last bits of the result depend on it.",
}
RAY = {
    "metavar": "ADDRESS",
    "help": "Put the workers on a Ray cluster: host:port, auto for the one this machine is in, "
    "local to start one here. One worker per machine unless --workers says otherwise.",
}


def output_option(what: str) -> Callable[[Decorated], Decorated]:
    """Return the `-o` option of a command that writes `what`."""
    return click.option(
        "-o", "--output", type=PATH, required=True, metavar="PATH", help=f"{what} to write."
    )


def reporting(function: Callable[..., None]) -> Callable[..., None]:
    """Add the options that every command has, `--json` and `--debug`, and its usage errors."""

    @functools.wraps(function)
    def run(**given: Any) -> None:
        try:
            function(**given)
        except ArgumentError as error:
            raise click.UsageError(str(error)) from error

    return json_option(debug_option(run))


def report(result: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print a result as one JSON object or as text for a person."""
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False, default=str))
    else:
        click.echo(escape_controls(text))


def span(numbers: Sequence[int]) -> str:
    """Return one number, or the least and the largest, such as `32 to 40`."""
    least, largest = min(numbers), max(numbers)
    return str(least) if least == largest else f"{least} to {largest}"
