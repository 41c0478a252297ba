"""Damage files and count what the commands say: `python -m benchmarks.fuzzing --cases 3000`.

Prints a row a format (cases, how many were refused, how many were read all the same, the
longest message) and every fault with the seed that shows it again: `--only FORMAT --seed N
--cases 1`. Ends with 1 where there are faults.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import click

from benchmarks.fuzz.formats import FORMATS
from benchmarks.fuzz.good_files import make_base
from benchmarks.fuzz.run import Case, check_undamaged, import_first, run_case
from benchmarks.tables import write_table


@click.command(help=__doc__)
@click.option("--cases", type=click.IntRange(1), default=3000, help="Cases over all formats.")
@click.option("--seed", type=click.IntRange(0), default=0, help="Number of the first case.")
@click.option("--only", multiple=True, help="A format's name. Repeatable.")
@click.option(
    "--base", type=click.Path(path_type=Path), help="Where the good files are kept; made anew."
)
def main(cases: int, seed: int, only: tuple[str, ...], base: Path | None) -> None:
    """Run the cases and print the table."""
    chosen = [form for form in FORMATS if not only or form.name in only]
    if not chosen:
        raise click.UsageError(f"--only must be one of {', '.join(f.name for f in FORMATS)}.")
    with tempfile.TemporaryDirectory() as folder:
        good = base or Path(folder) / "good"
        if not good.exists():
            make_base(good)
        import_first()
        each = -(-cases // len(chosen))
        rows, faults = [], 0
        for form in chosen:
            check_undamaged(form, good)
            found = [run_case(form, number, good) for number in range(seed, seed + each)]
            rows.append(_row(form.name, found))
            for case in found:
                for fault in case.faults:
                    click.echo(f"{case.format}, seed {case.seed}: {fault}", err=True)
                    faults += 1
    write_table(
        ["file", "cases", "refused", "read all the same", "longest message", "faults"], rows
    )
    sys.exit(1 if faults else 0)


def _row(name: str, found: list[Case]) -> list[str]:
    refused = sum(case.refused for case in found)
    return [
        name,
        str(len(found)),
        str(refused),
        str(len(found) - refused),
        str(max(case.message for case in found)),
        str(sum(len(case.faults) for case in found)),
    ]


if __name__ == "__main__":
    main()
