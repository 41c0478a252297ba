"""`edgemoe inspect`: what any file or directory of edgemoe is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from edgemoe.cli.options import PATH, command, report, reporting

if TYPE_CHECKING:
    from pathlib import Path

# Long lists that no person reads.
_ONLY_JSON = ("inputs", "outputs", "files", "experts")


@command("edgemoe inspect demo/bundle", "edgemoe inspect code.plan.json")
@click.argument("path", type=PATH)
@reporting
def inspect(path: Path, as_json: bool) -> None:
    """Describe PATH: a checkpoint, statistics, a plan, a report, a bundle or an engine.

    Says what it is, its size and shapes, the experts of each layer, and where it comes from.
    """
    from edgemoe.cli.describe import describe

    facts = describe(path)
    report(facts, "\n".join(_lines(facts)), as_json=as_json)


def _lines(facts: dict[str, Any], indent: str = "") -> list[str]:
    """Return one aligned line per fact; a mapping is indented below its name."""
    shown = {name: value for name, value in facts.items() if name not in _ONLY_JSON}
    width = max(map(len, shown), default=0)
    lines: list[str] = []
    for name, value in shown.items():
        label = f"{indent}{name.replace('_', ' '):<{width}}"
        value = _by_name(value)
        if isinstance(value, dict) and value:
            lines += [label.rstrip(), *_lines(value, f"{indent}  ")]
        else:
            lines.append(f"{label}  {_text(value)}")
    return lines


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


def _text(value: object) -> str:
    if isinstance(value, list):
        texts = [_text(item) for item in value]
        if len(texts) > 2 and len(set(texts)) == 1:
            return f"{texts[0]} ({len(texts)} times)"
        return ", ".join(texts) or "-"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items()) or "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value is None else str(value)
