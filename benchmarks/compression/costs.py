"""Time and memory of every method: from statistics to a plan, and from a plan to a recovery.

Each command runs alone, in a process of its own, with one thread; time is that of the
processor, so other work on the machine matters little. Run it from the repository's root, with
the demo's model and a folder that benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.compression.costs demo/moe --tasks demo/domains --work costs

Markdown goes to stdout, progress to stderr. What is finished stays in --work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from benchmarks.commands import Commands
from benchmarks.tables import write_table
from benchmarks.task_options import on_one_task
from edgemoe.prune.registry import METHODS

if TYPE_CHECKING:
    from pathlib import Path

# Of the recoveries that train: more steps take longer in proportion, and no more memory.
_STEPS = 2
_BATCH_TOKENS = 1024


@click.command()
@on_one_task
@click.option("--keep", default=0.5, show_default=True)
@click.option("--calibration-tokens", default=8192, show_default=True)
@click.option("--recovery-tokens", default=4096, show_default=True)
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    keep: float,
    calibration_tokens: int,
    recovery_tokens: int,
) -> None:
    """Measure what every method takes for MODEL."""
    commands = Commands(work, threads=1)
    lines = f"{task}={tasks / f'{task}.train.jsonl'}"
    of_task = ("--stats", work / "stats.safetensors", "--task", task)
    share = ("--keep", keep)
    todo: dict[str, tuple[object, ...]] = {
        "stats.safetensors": (
            *("calibrate", model, "--task", lines),
            *("--max-tokens", calibration_tokens),
        )
    }
    for method in METHODS:
        given = ("prune", model, *of_task, "--method", method, *share)
        todo[f"{method}.json"] = given
    todo["moe-i2-given.json"] = (*todo["moe-i2.json"], "--set", "ratios=given")
    todo["owl.json"] = (*todo["reap.json"], "--layers", "owl")
    todo["pruned"] = ("apply", model, "--plan", work / "reap.json")
    rank = ("decompose", model, *of_task, "--plan", work / "reap.json", "--param-ratio", 0.75)
    for method in ("svd", "svd-whitened", "shared-basis"):
        todo[f"{method}.json"] = (*rank, "--method", method)
        todo[method] = ("apply", model, "--plan", work / f"{method}.json")
    of_teacher = ("--teacher", model, "--task", lines, "--max-tokens", recovery_tokens)
    recover = ("recover", work / "pruned", *of_teacher)
    todo["least-squares"] = (*recover, "--method", "least-squares")
    steps = ("--steps", _STEPS, "--batch-tokens", _BATCH_TOKENS)
    for method in ("router-kd", "lora", "lora+router-kd", "uncurl"):
        todo[method] = (*recover, "--method", method, *steps)

    rows = []
    for name, arguments in todo.items():
        done = commands.make(name, *arguments)
        hidden = (model, "--teacher", lines, *of_task)
        shown = " ".join(str(word) for word in arguments if word not in hidden)
        rows.append(
            [
                f"`{shown.replace(f'{work}/', '')}`",
                f"{done.cpu_seconds:.0f}",
                f"{done.peak_bytes / 1e9:.2f}",
            ]
        )
    write_table(["command", "processor seconds", "peak memory, GB"], rows)


if __name__ == "__main__":
    main()
