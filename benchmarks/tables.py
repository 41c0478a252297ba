"""Figures as Markdown: scores with their 95% intervals, sizes, and tables of them."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING

import click

from edgemoe.evaluate.drop import paired_drop

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.evaluate.evaluation import Evaluation


def show_score(score: Evaluation) -> str:
    """Write a score and its 95% interval."""
    low, high = score.ci95
    return f"{score.value:.4g} [{low:.4g}, {high:.4g}]"


def show_drop(before: Evaluation, after: Evaluation) -> str:
    """Write how much worse a score is, and its 95% interval over paired lines."""
    drop = paired_drop(before, after)
    low, high = drop.ci95
    return f"{100 * drop.value:+.1f}% [{100 * low:+.1f}, {100 * high:+.1f}]"


def megabytes(checkpoint: Path) -> str:
    """Write the size of a checkpoint's weights in MB."""
    size = sum(file.stat().st_size for file in checkpoint.glob("*.safetensors"))
    return f"{size / 1e6:.0f}"


def write_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table in Markdown."""
    click.echo(f"| {' | '.join(heading)} |")
    click.echo(f"|{'---|' * len(heading)}")
    for row in rows:
        click.echo(f"| {' | '.join(row)} |")


def write_csv(path: Path, heading: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Write a table for the pictures of docs/pictures; its folder is made if it is absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(heading)
        writer.writerows(rows)
