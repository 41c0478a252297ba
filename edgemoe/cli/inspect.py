"""``edgemoe inspect``: what any file of the road is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from edgemoe.cli.options import PATH, report, reporting

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@click.argument("path", type=PATH)
@reporting
def inspect(path: Path, as_json: bool) -> None:
    """Describe PATH: a checkpoint, statistics, a plan, a bundle or an engine."""
    from edgemoe.cli.describe import describe

    facts = describe(path)
    report(facts, "\n".join(_lines(facts)), as_json=as_json)


def _lines(facts: dict[str, object], indent: str = "") -> list[str]:
    """Return one aligned line per fact; a mapping is indented below its name."""
    width = max((len(name) for name in facts), default=0)
    lines: list[str] = []
    for name, value in facts.items():
        label = f"{indent}{name.replace('_', ' '):<{width}}"
        if isinstance(value, dict) and value:
            lines += [label.rstrip(), *_lines(value, indent + "  ")]
        else:
            lines.append(f"{label}  {_text(value)}")
    return lines


def _text(value: object) -> str:
    if isinstance(value, (list, tuple)):
        texts = [_text(item) for item in value]
        return f"{texts[0]} x {len(texts)}" if _repeats(texts) else ", ".join(texts)
    if isinstance(value, float):
        return f"{value:.6g}"
    return "-" if value in (None, {}) else str(value)


def _repeats(texts: list[str]) -> bool:
    return len(texts) > 2 and len(set(texts)) == 1
