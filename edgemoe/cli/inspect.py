"""`edgemoe inspect`: what any file or directory of edgemoe is."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.options import PATH, command, force_option, report, reporting
from edgemoe.errors import ArgumentError

if TYPE_CHECKING:
    from pathlib import Path

# Long lists that no person reads.
_ONLY_JSON = ("inputs", "outputs", "files", "experts")
# Of data and machine: paths, and digests by which a guess at a file can be checked.
_TELLING = ("path", "model", "file", "files_sha256", "sha256", "held_out_sha256", "provenance")
_MOST_LINES = 24
_MOST_COLUMNS = 100
_MOST_ITEMS = 8  # of a list whose items differ


@command(
    "edgemoe inspect demo/bundle",
    "edgemoe inspect code.plan.json",
    "edgemoe inspect code.stats --redact -o shared.stats",
)
@click.argument("path", type=PATH)
@click.option(
    "--full",
    is_flag=True,
    help="All facts, however long; of a checkpoint also those that its model has to be built "
    "for.",
)
@click.option(
    "--redact",
    is_flag=True,
    help="Leave out paths and what tells of the data: for sharing. With -o, copy statistics or "
    "a report without the text that they hold.",
)
@click.option("-o", "--output", type=PATH, metavar="PATH", help="Copy to write, with --redact.")
@force_option
@reporting
def inspect(
    path: Path, full: bool, redact: bool, output: Path | None, force: bool, as_json: bool
) -> None:
    """Describe PATH: a checkpoint, statistics, a plan, a report, a bundle or an engine.

    Says what it is, its size and shapes, the experts of each layer, and where it comes from, on
    one screen; of statistics, plans and reports also whether the calibration's text can be read
    in them.
    """
    from edgemoe.cli.describe.file import describe

    if (output is not None or force) and not redact:
        raise ArgumentError("-o and --force are for copies: give --redact too.")
    if output is not None:
        from edgemoe.api.redact import redact as copy_redacted

        copy_redacted(path, output, force=force)
        path = output
    facts = describe(path, full=full)
    if redact:
        facts = _redacted(facts)
    lines = _lines(facts, full=full)
    report(facts, "\n".join(lines if full else _fit(lines)), as_json=as_json)


def _redacted(facts: dict[str, Any]) -> dict[str, Any]:
    """Leave out what tells of the data or of this machine, at any depth."""
    return {
        name: _redacted(value) if isinstance(value, dict) else value
        for name, value in facts.items()
        if name not in _TELLING
    }


def _lines(facts: dict[str, Any], indent: str = "", *, full: bool) -> list[str]:
    """Return one aligned line per fact; a mapping is indented below its name."""
    shown = {name: value for name, value in facts.items() if full or name not in _ONLY_JSON}
    width = max(map(len, shown), default=0)
    lines: list[str] = []
    for name, value in shown.items():
        label = f"{indent}{name.replace('_', ' '):<{width}}"
        value = _by_name(value)
        if isinstance(value, dict) and value and full:
            lines += [label.rstrip(), *_lines(value, f"{indent}  ", full=full)]
        elif isinstance(value, dict) and any(isinstance(one, dict) for one in value.values()):
            lines.append(label.rstrip())
            lines += [
                _clip(f"{indent}  {key}  {_text(one, full=full)}") for key, one in value.items()
            ]
        else:
            text = f"{label}  {_text(value, full=full)}"
            if full or len(text) <= _MOST_COLUMNS:
                lines.append(text)
            elif isinstance(value, str):
                lines += textwrap.wrap(
                    text, _MOST_COLUMNS, subsequent_indent=" " * (len(label) + 2)
                )
            else:
                lines.append(_clip(text))
    return lines


def _fit(lines: list[str]) -> list[str]:
    """Return what fits on a screen: the deeper lines are left out first."""
    left_out = 0
    while len(lines) + bool(left_out) > _MOST_LINES:
        deepest = max(len(line) - len(line.lstrip()) for line in lines)
        last = max(
            number
            for number, line in enumerate(lines)
            if len(line) - len(line.lstrip()) == deepest
        )
        lines = lines[:last] + lines[last + 1 :]
        left_out += 1
    return lines + ([f"({left_out} more with --full)"] if left_out else [])


def _clip(line: str) -> str:
    return line if len(line) <= _MOST_COLUMNS else f"{line[: _MOST_COLUMNS - 4]} ..."


def _by_name(value: Any) -> Any:
    """Return a list of things that have names as a mapping, anything else as it is."""
    if not isinstance(value, list) or not value:
        return value
    if not all(isinstance(item, dict) and "name" in item for item in value):
        return value
    return {
        item["name"]: {key: fact for key, fact in item.items() if key != "name"}
        for item in value
    }


def _text(value: object, *, full: bool) -> str:
    if isinstance(value, list):
        texts = [_text(item, full=full) for item in value]
        if len(texts) > 2 and len(set(texts)) == 1:
            return f"{texts[0]} ({len(texts)} times)"
        if not full and len(texts) > 2 and _is_run(value):
            return f"{texts[0]} to {texts[-1]}"
        if not full and len(texts) > _MOST_ITEMS:
            return f"{', '.join(texts[:_MOST_ITEMS])} ... ({len(texts)} in all)"
        return ", ".join(texts) or "-"
    if isinstance(value, dict):
        items = {key: item for key, item in value.items() if full or key not in _ONLY_JSON}
        texts = [
            f"{name.replace('_', ' ')} {_text(item, full=full)}" for name, item in items.items()
        ]
        return ", ".join(texts) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and not full and len(value) > _MOST_COLUMNS and " " not in value:
        # digests of lines and packed tokens: base64 that only programs read
        return f"{value[:16]}... ({len(value)} characters)"
    return "-" if value is None else str(value)


def _is_run(values: list[Any]) -> bool:
    """Return whether these are whole numbers, each one more than the last."""
    return all(type(value) is int for value in values) and values == list(
        range(values[0], values[0] + len(values))
    )
