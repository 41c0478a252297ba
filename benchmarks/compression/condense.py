"""Reports of sweeps as tables that fit on a page: a line per method, a column per cut.

    edgemoe sweep demo/moe --task code=... --method reap,heapr --recover least-squares -o report
    python -m benchmarks.compression.condense report/sweep.csv

Several sweeps of one model, on the same lines, make one table: methods that take long may be
swept apart. For each task the rise of its perplexity (or the fall of its accuracy, in points)
before and after each recovery, and the rise on the other task that the cut costs most. Markdown
goes to stdout; `--together` writes the rows of all reports into one file.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

import click

from benchmarks.tables import write_table

if TYPE_CHECKING:
    from collections.abc import Sequence

Row = dict[str, str]


@click.command()
@click.argument(
    "tables",
    metavar="SWEEP.CSV...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
)
@click.option("--together", type=click.Path(path_type=Path), help="File for all rows.")
def main(tables: tuple[Path, ...], together: Path | None) -> None:
    """Condense the sweep.csv of one or more reports."""
    rows = read(tables)
    if together is not None:
        with together.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    cuts = [row for row in rows if row["task"]]
    keeps = sorted({float(row["keep"]) for row in cuts}, reverse=True)
    for whole in (row for row in rows if not row["task"]):
        task = whole["judged_on"]
        own = [row for row in cuts if row["task"] == task == row["judged_on"]]
        if not own:
            continue
        low, high = float(whole["ci95_low"]), float(whole["ci95_high"])
        click.echo(
            f"\n**{task}**: {whole['metric']} {float(whole['score']):.4g} "
            f"[{low:.4g}, {high:.4g}] unpruned, {whole['lines']} lines, {whole['tokens']} "
            "tokens.\n"
        )
        lines = []
        for method, recovery in dict.fromkeys((row["method"], row["recovery"]) for row in own):
            name = f"`{method}`" + (f", then `{recovery}`" if recovery else "")
            cells, sizes, others = [], [], []
            for keep in keeps:
                found = [
                    row
                    for row in cuts
                    if (row["task"], row["method"], row["recovery"]) == (task, method, recovery)
                    and float(row["keep"]) == keep
                ]
                cells.append(_show_own(found, task))
                others.append(_show_worst(found, task))
                sizes += [f"{float(row['checkpoint_bytes']) / 1e6:.0f}" for row in found[:1]]
            lines.append([name, *cells, ", ".join(others), ", ".join(sizes)])
        columns = [f"keep {keep:g}" for keep in keeps]
        write_table(["method", *columns, "worst other task", "MB"], lines)


def read(tables: Sequence[Path]) -> list[Row]:
    """Read reports of one model on the same lines.

    Args:
        tables: Files sweep.csv.

    Returns:
        Their rows, those of the unpruned model once.

    Raises:
        ClickException: The unpruned model has other scores in one of them.
    """
    rows: list[Row] = []
    for table in tables:
        with table.open(encoding="utf-8", newline="") as file:
            found = list(csv.DictReader(file))
        whole = [row for row in found if not row["task"]]
        if rows and whole != [row for row in rows if not row["task"]]:
            raise click.ClickException(
                f"{table} must be of the same model and lines as {tables[0]}, got other scores "
                "of the unpruned model. Condense them apart."
            )
        rows += found[len(whole) if rows else 0 :]
    return rows


def _show_own(rows: list[Row], task: str) -> str:
    """Write the drops on the task itself, of every seed."""
    own = [row for row in rows if row["judged_on"] == task]
    return "; ".join(
        f"{_percent(row['drop'])} [{_percent(row['drop_ci95_low'])}, "
        f"{_percent(row['drop_ci95_high'])}]"
        for row in own
    )


def _show_worst(rows: list[Row], task: str) -> str:
    others = [row for row in rows if row["judged_on"] != task]
    if not others:
        return ""
    worst = max(others, key=lambda row: float(row["drop"]))
    return f"{worst['judged_on']} {_percent(worst['drop'])}"


def _percent(share: str) -> str:
    value = 100 * float(share)
    return f"{value:+.0f}" if abs(value) >= 10 else f"{value:+.1f}"


if __name__ == "__main__":
    main()
