"""Run edgemoe again and again, killed each time at some file operation, until it finishes.

    python killed_runs.py SEED KILLS ARGUMENT...

Each run is a fork of this process, which has imported everything and computed nothing yet. It
kills itself with SIGKILL at a file operation drawn at random; after KILLS kills it may finish.
Prints one JSON list: for each run, the number of operations that it reached.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys

import torch

import edgemoe.calibrate.streamed
import edgemoe.prune.apply_streamed  # noqa: F401  imported before the forks, not in each
from edgemoe.cli import main

_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree"}


def run(arguments: list[str], kill_at: int | None, report: int) -> None:
    """Run the command in this process, which ends with it."""
    count = 0

    def count_operation(event: str, _: object) -> None:
        nonlocal count
        if event in _OPERATIONS:
            count += 1
            os.pwrite(report, f"{count:8}".encode(), 0)
            if count == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count_operation)
    main(arguments)


def repeat(seed: int, kills: int, arguments: list[str]) -> list[int]:
    """Run until the command has finished, and return how far each run came."""
    draw = random.Random(seed)
    reached: list[int] = []
    report = os.memfd_create("operations")
    while True:
        os.ftruncate(report, 0)
        # Some runs come far, others are killed at once.
        kill_at = draw.randint(1, draw.choice([20, 80, 250])) if len(reached) < kills else None
        child = os.fork()
        if child == 0:
            run(arguments, kill_at, report)
        _, status = os.waitpid(child, 0)
        reached.append(int(os.pread(report, 8, 0) or 0))
        if not os.WIFSIGNALED(status):
            if os.waitstatus_to_exitcode(status):
                raise SystemExit(1)
            return reached


if __name__ == "__main__":
    torch.set_num_threads(1)
    told = repeat(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
    sys.stdout.write(json.dumps(told) + "\n")
