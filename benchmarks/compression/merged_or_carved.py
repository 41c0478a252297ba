r"""UNCURL's claim at a small scale: a merged 16 -> 8 against 8 experts from the start.

A dense model is carved into 16 experts, which UNCURL merges to 8, and into 8 experts of twice
the width, which stay. Both train on the same tokens with the same method. Because the carved
experts are twice as large, they are judged once more after CAMERA-P has made them as narrow as
the merged ones, and 16 experts of which REAP keeps 8 stand beside. A token uses six experts in
all of them. Run it from the repository's root, with the demo's dense model and a folder that
benchmarks/reference_moe/corpus.py wrote::

    python -m benchmarks.compression.merged_or_carved demo/dense --tasks demo/domains \
        --work merged

Markdown goes to stdout, progress to stderr; --work keeps what is finished. Training takes most
of the time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from benchmarks.commands import Commands
from benchmarks.tables import megabytes, show_drop, show_score, write_table
from benchmarks.task_options import on_one_task

if TYPE_CHECKING:
    from pathlib import Path


@click.command()
@on_one_task
@click.option("--calibration-tokens", default=8192, show_default=True)
@click.option("--held-out-tokens", default=3072, show_default=True)
@click.option("--steps", default=16, show_default=True, help="1024 tokens each.")
def main(
    model: Path,
    tasks: Path,
    task: str,
    work: Path,
    calibration_tokens: int,
    held_out_tokens: int,
    steps: int,
    threads: int,
) -> None:
    """Merge experts that were carved out of the dense MODEL, and carve fewer."""
    commands = Commands(work, threads)
    lines = f"{task}={tasks / f'{task}.train.jsonl'}"
    for experts in (16, 8):
        name = f"carved{experts}"
        commands.make(name, "carve", model, "--experts", experts, "--top-k", 6)
        limit = ("--max-tokens", calibration_tokens)
        commands.make(f"{name}-stats", "calibrate", work / name, "--task", lines, *limit)
    plans = {
        "merged": ("carved16", "uncurl"),
        "kept": ("carved16", "reap"),
        "narrowed": ("carved8", "camera"),
    }
    for name, (carved, method) in plans.items():
        asked = ("--stats", work / f"{carved}-stats", "--task", task, "--keep", 0.5)
        commands.make(f"{name}.json", "prune", work / carved, *asked, "--method", method)
        commands.make(name, "apply", work / carved, "--plan", work / f"{name}.json")
    shown = {
        "merged": ("8 narrow, merged by UNCURL from 16", ("uncurl", "lora+router-kd")),
        "kept": ("8 narrow, kept by REAP of 16", ("lora+router-kd",)),
        "narrowed": (
            "8 narrow, carved as 8 wide and narrowed by CAMERA-P",
            ("lora+router-kd",),
        ),
        "carved8": ("8 wide, carved as 8", ("lora+router-kd",)),
        "carved16": ("16 narrow, carved as 16", ()),
    }
    trained = ("--teacher", model, "--task", lines, "--steps", steps, "--batch-tokens", 1024)
    held_out = tasks / f"{task}.test.jsonl"
    whole = commands.judge("dense", model, held_out, held_out_tokens)
    rows = [["dense", "", megabytes(model), show_score(whole), ""]]
    for name, (text, methods) in shown.items():
        before = commands.judge(name, work / name, held_out, held_out_tokens)
        size = megabytes(work / name)
        rows.append([text, "none", size, show_score(before), show_drop(whole, before)])
        for method in methods:
            after_name = f"{name}-{method}"
            commands.make(after_name, "recover", work / name, "--method", method, *trained)
            after = commands.judge(after_name, work / after_name, held_out, held_out_tokens)
            rows.append([text, method, size, show_score(after), show_drop(whole, after)])
    heading = ["experts of a layer", f"training, {1024 * steps} tokens", "MB"]
    write_table([*heading, "perplexity [95%]", "rise over dense [95%]"], rows)


if __name__ == "__main__":
    main()
