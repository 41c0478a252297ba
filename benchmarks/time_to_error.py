"""How long a mistake takes to be told, and `inspect` to answer.

    python -m benchmarks.time_to_error

Every command runs as a process of its own, the commands in turn, and medians are printed. The
files are tiny, so what is measured is what comes before the work; `--checkpoint` and `--bundle`
add larger ones to inspect.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from benchmarks.tables import write_table

_LINES = 24
# What is wrong, and the command that has it.
MISTAKES = {
    "a broken line in a task file": "calibrate moe --task t=broken.jsonl -o out",
    "the same, for an export": "export moe --task t=broken.jsonl --target cpu -o out",
    "statistics given for a plan": "apply moe --plan t.stats -o out",
    "a plan given for statistics": "prune moe --stats t.json --task t --method reap --keep 0.5 "
    "-o out",
    "a method that does not exist": "prune moe --stats t.stats --task t --method best "
    "--keep 0.5 -o out",
    "an option of another method": "sweep moe --task t=good.jsonl --method reap "
    "--set uncurl:x=1 -o out",
    "a fraction above 1": "prune moe --stats t.stats --task t --method reap --keep 1.5 -o out",
    "a folder that does not exist": "calibrate moe --task t=good.jsonl -o none/out",
    "no checkpoint": "calibrate nothing --task t=good.jsonl -o out",
    "a target that does not exist": "export moe --target phone -o out",
}
INSPECTED = ("moe", "t.stats", "t.json", "bundle")


@click.command(help=__doc__)
@click.option("--repeats", type=click.IntRange(1), default=5, help="Runs of each command.")
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Another one to inspect.")
@click.option("--bundle", type=click.Path(path_type=Path), help="Another one to inspect.")
def main(repeats: int, checkpoint: Path | None, bundle: Path | None) -> None:
    """Run the commands and print two tables."""
    more = [path.resolve() for path in (checkpoint, bundle) if path is not None]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder)
        inspected = {str(path): f"inspect {path}" for path in (*INSPECTED, *more)}
        commands = {**MISTAKES, **inspected}
        times: dict[str, list[float]] = {what: [] for what in commands}
        messages: dict[str, str] = {}
        for _ in range(repeats):
            for what, command in commands.items():
                took, status, messages[what] = run(command, folder)
                if bool(status) != (what in MISTAKES):
                    raise click.ClickException(f"edgemoe {command} ended with {status}")
                times[what].append(took)
    medians = {what: f"{statistics.median(found):.2f}" for what, found in times.items()}
    rows = [[what, messages[what][:90], medians[what]] for what in MISTAKES]
    write_table(["mistake", "the message begins", "s"], rows)
    click.echo()
    write_table(["inspect", "s"], [[Path(what).name, medians[what]] for what in inspected])


def make_files(folder: Path) -> None:
    """Write a checkpoint, lines, statistics, a plan and a bundle, all tiny."""
    from edgemoe.models.tiny import write_tiny_checkpoint

    write_tiny_checkpoint("qwen3_moe", folder / "moe")
    lines = [
        json.dumps({"text": " ".join(f"w{(7 * n + k) % 96}" for k in range(12))})
        for n in range(_LINES)
    ]
    (folder / "good.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    broken = [*lines[:3], '{"text": ', *lines[3:]]
    (folder / "broken.jsonl").write_text("\n".join(broken) + "\n", encoding="utf-8")
    for command in (
        "calibrate moe --task t=good.jsonl -o t.stats",
        "prune moe --stats t.stats --task t --method reap --keep 0.5 -o t.json",
        "export moe --plan t=t.json --target cpu -o bundle",
    ):
        _, status, message = run(command, folder)
        if status:
            raise click.ClickException(f"edgemoe {command}: {message}")


def run(command: str, folder: Path) -> tuple[float, int, str]:
    """Run a command.

    Args:
        command: Arguments of `edgemoe`.
        folder: Where.

    Returns:
        Wall-clock seconds, the exit status, and what it wrote to stderr, without `Error: `.
    """
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "edgemoe.cli", *command.split()],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    took = time.perf_counter() - begun
    told = " ".join(done.stderr.split())
    return took, done.returncode, told.partition("Error: ")[2] or told


if __name__ == "__main__":
    main()
