"""The task's lines: some choose the experts, others judge what that cost.

Every fourth line of a task file is held out: lines 4, 8, 12 and so on. Experts are chosen on
the rest, scores are those of the held-out lines. Neighbouring lines are often alike, so a
split in two halves would test another text than the one that was calibrated on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe.errors import TaskFileError

if TYPE_CHECKING:
    from edgemoe.tasks import TaskFile

HELD_OUT_EVERY = 4
MINIMUM_LINES = 8


def hold_out(task: TaskFile, *, remedy: str) -> tuple[TaskFile, TaskFile]:
    """Split a task's lines into those to calibrate on and those to judge by.

    Args:
        task: The task.
        remedy: What to do where there are too few, a sentence.

    Returns:
        Calibration lines and held-out lines, in the order of the file.

    Raises:
        TaskFileError: The file has too few lines for both.
    """
    if len(task.records) < MINIMUM_LINES:
        raise TaskFileError(
            f"{task.path}: a task to choose experts for must have {MINIMUM_LINES} lines or "
            f"more, since every {HELD_OUT_EVERY}th is held out to judge the result, got "
            f"{len(task.records)}. {remedy}"
        )
    held_out = tuple(task.records[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    calibration = tuple(
        record for number, record in enumerate(task.records, start=1) if number % HELD_OUT_EVERY
    )
    return replace(task, records=calibration), replace(task, records=held_out)
