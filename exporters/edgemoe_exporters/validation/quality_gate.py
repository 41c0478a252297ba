"""The quality gate of an export: scores before and after, and the allowed drop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import QualityGateError
from edgemoe.evaluate.drop import measure_drop
from edgemoe.evaluate.held_out import hold_out
from edgemoe_runtime.bundle.task_entry import DataInfo, QualityReport

if TYPE_CHECKING:
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.tasks import TaskFile


ROUNDING = 1e-6
"""Tolerance of a drop's limit: an engine's sums round, and 0.8 - 0.75 is not 0.05."""


def split_task(task: TaskFile) -> tuple[TaskFile, TaskFile]:
    """Split a task's examples into those for calibration and those for evaluation.

    Args:
        task: The task.

    Returns:
        Calibration and held-out examples, as `edgemoe.evaluate.held_out.hold_out`.

    Raises:
        TaskFileError: The file has too few lines for both.
    """
    return hold_out(task, remedy=f"Add lines, or give a plan too: --plan {task.name}=PLAN.")


def check_quality(
    task: TaskFile, before: Evaluation, after: Evaluation, max_drop: float | None
) -> QualityReport:
    """Compare scores, and check that the drop is within its limit.

    Args:
        task: The held-out examples.
        before: Score of the checkpoint.
        after: Score of the exported graph.
        max_drop: Largest drop allowed, as `edgemoe.evaluate.drop.measure_drop` counts
            it; None for any.

    Returns:
        The entry of the manifest.

    Raises:
        QualityGateError: The drop is larger.
    """
    drop = measure_drop(before, after)
    if max_drop is not None and not drop <= max_drop + ROUNDING:
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
