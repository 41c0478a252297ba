"""Run edgemoe again and again, killed at some file operation, until it may finish.

    python killed_runs.py SEED KILLS MOST WORK ARGUMENT...

Each run is a fork of this process, which has imported most and computed nothing yet (not
onnxruntime, which starts a thread: locks of threads do not survive a fork). It kills itself
with SIGKILL at an operation on the folder WORK or something in it, drawn at random from the
first MOST; after KILLS runs it may finish, and WORK is the output with `.partial`. Prints one
JSON list: for each run, whether it found a finished step of an earlier one.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

from edgemoe.cli import main

# Imported before the forks, not in each.
for module in (
    "edgemoe.apply.streamed",
    "edgemoe.calibrate.streamed",
    "edgemoe_exporters.lowering.onnxruntime",
    "edgemoe_exporters.tracing.trace",
):
    importlib.import_module(module)


def run(arguments: list[str], kill_at: int | None, prefix: str) -> None:
    """Run the command in this process, which ends with it."""
    count = 0

    def count_operation(_: str, given: tuple[object, ...]) -> None:
        nonlocal count
        # Opening, renaming, making and removing: each names its path first.
        if given and isinstance(given[0], (str, os.PathLike)):
            count += str(given[0]).startswith(prefix)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_operation)
    main(arguments)


def repeat(seed: int, kills: int, most: int, work: Path, arguments: list[str]) -> list[bool]:
    """Run until the command has finished, and tell of each run whether it went on."""
    draw = random.Random(seed)
    resumed: list[bool] = []
    while True:
        kill_at = draw.randint(1, most) if len(resumed) < kills else None
        resumed.append(any(work.rglob("*progress.json")) or any(work.glob("steps/*.*")))
        child = os.fork()
        if child == 0:
            run(arguments, kill_at, os.environ.get("KILLED_PREFIX", str(work)))
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status) and os.waitstatus_to_exitcode(status):
            raise SystemExit(1)
        if kill_at is None:
            return resumed
        output = work.with_suffix("")
        if output.exists():
            # It finished before the moment that was drawn, or at it: all over again.
            _remove(output)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = sys.argv[1:]
    if given[4] == "recover":
        importlib.import_module("edgemoe.recover.recovery")
        importlib.import_module("peft")
    told = repeat(int(given[0]), int(given[1]), int(given[2]), Path(given[3]), given[4:])
    sys.stdout.write(json.dumps(told) + "\n")
