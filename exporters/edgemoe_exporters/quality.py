"""The task's lines: some choose the experts, others judge what that cost.

Every fourth line of a task file is held out: lines 4, 8, 12 and so on. Experts are chosen on
the rest, scores before and after are those of the held-out lines. Neighbouring lines are often
alike, so a split in two halves would test another text than the one that was calibrated on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe.errors import QualityGateError, TaskFileError
from edgemoe_runtime.manifest_parts import DataInfo, QualityReport

if TYPE_CHECKING:
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.tasks import TaskFile

HELD_OUT_EVERY = 4
MINIMUM_LINES = 8


def split_task(task: TaskFile) -> tuple[TaskFile, TaskFile]:
    """Split a task's lines into those to calibrate on and those to judge by.

    Args:
        task: The task.

    Returns:
        Calibration lines and held-out lines, in the order of the file.

    Raises:
        TaskFileError: The file has too few lines for both.
    """
    if len(task.records) < MINIMUM_LINES:
        raise TaskFileError(
            f"{task.path}: a task to export for must have {MINIMUM_LINES} lines or more, since "
            f"every {HELD_OUT_EVERY}th is held out to judge the result, got "
            f"{len(task.records)}. Add lines, or give a plan too: --plan {task.name}=PLAN."
        )
    held_out = tuple(task.records[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY])
    calibration = tuple(
        record for number, record in enumerate(task.records, start=1) if number % HELD_OUT_EVERY
    )
    return replace(task, records=calibration), replace(task, records=held_out)


def measure_drop(before: Evaluation, after: Evaluation) -> float:
    """Return how much worse a score is.

    Args:
        before: Score of the checkpoint.
        after: Score of the exported graph, of the same lines.

    Returns:
        Perplexity: its relative rise, 0.05 for 5%. Accuracy: its absolute fall, 0.05 for five
        points. Negative where the score is better.
    """
    if before.metric == "perplexity":
        return after.value / before.value - 1
    return before.value - after.value


def judge_quality(
    task: TaskFile, before: Evaluation, after: Evaluation, max_drop: float | None
) -> QualityReport:
    """Compare scores, and refuse what lost too much.

    Args:
        task: The held-out lines.
        before: Score of the checkpoint.
        after: Score of the exported graph.
        max_drop: Largest drop allowed, as :func:`measure_drop` counts it; None for any.

    Returns:
        What the manifest records.

    Raises:
        QualityGateError: The drop is larger.
    """
    drop = measure_drop(before, after)
    if max_drop is not None and not drop <= max_drop:
        kind = "relative rise" if before.metric == "perplexity" else "fall in points of 1"
        raise QualityGateError(
            f"{before.metric} of task {task.name} must get worse by at most --max-drop "
            f"{max_drop:g} ({kind}), got {drop:.4g}: from {_show(before)} to {_show(after)} "
            f"on {after.n} held-out lines. Nothing was written. Keep more experts (--keep), "
            "choose a higher --precision, or allow a larger --max-drop."
        )
    return QualityReport(
        before=before.to_dict(),
        after=after.to_dict(),
        data=DataInfo(file=task.path.name, sha256=task.sha256, lines=after.n),
        max_drop=max_drop,
        passed=None if max_drop is None else True,
    )


def _show(score: Evaluation) -> str:
    low, high = score.ci95
    return f"{score.value:.4g} [{low:.4g}, {high:.4g}]"
