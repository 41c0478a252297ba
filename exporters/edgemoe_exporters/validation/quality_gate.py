"""The quality gate of an export: scores before and after, and the allowed drop."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import ExportError, QualityGateError, TaskFileError
from edgemoe.evaluate.gate import (
    ACCEPT_WEAK,
    MINIMUM_LINES,
    JudgedDrop,
    count_judged,
    find_limit_fault,
    find_weaknesses,
    judge_drop,
    lines_are_few,
)
from edgemoe.evaluate.held_out import hold_out
from edgemoe_runtime.bundle.task_entry import DataInfo, QualityReport

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.tasks import TaskFile


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


def check_evidence(
    task: TaskFile,
    max_drop: float,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    max_tokens: int,
    accept_large: bool,
    accept_few: bool,
) -> None:
    """Refuse a limit that these lines cannot judge, before anything is measured.

    Args:
        task: The lines that will judge.
        max_drop: The limit.
        tokenizer: The model's tokenizer.
        max_length: Most tokens that the model reads at once.
        max_tokens: Tokens that judge at most.
        accept_large: Whether a perplexity may more than double.
        accept_few: Whether fewer than 20 lines may judge.

    Raises:
        ExportError: The limit is out of range for lines of this kind.
        TaskFileError: Fewer than 20 lines judge, and that is not accepted.
    """
    fault = find_limit_fault(max_drop, task.kind, accept_large=accept_large)
    if fault is not None:
        raise ExportError(fault)
    lines = count_judged(task, tokenizer, max_length=max_length, max_tokens=max_tokens)
    if lines < MINIMUM_LINES and not accept_few:
        more = lines < len(task.records)
        raise TaskFileError(
            f"{task.path}: --max-drop must be judged by {MINIMUM_LINES} lines or more, got "
            f"task {task.name!r}: {lines_are_few(lines)}. "
            f"{'Raise --held-out-tokens' if more else 'Add lines'}, or give {ACCEPT_WEAK}: the "
            "report says so then."
        )


def check_before(task: TaskFile, before: Evaluation, vocabulary: int) -> None:
    """Refuse to judge by a checkpoint that is not better than chance.

    Args:
        task: The held-out examples.
        before: Score of the checkpoint.
        vocabulary: Tokens that it chooses from.

    Raises:
        QualityGateError: It is not, or too few lines were scored.
    """
    for weakness in find_weaknesses(before, vocabulary):
        raise QualityGateError(
            f"--max-drop must be judged by evidence, got task {task.name}: {weakness}. No "
            f"bundle was written. Give lines that the checkpoint does better on, or "
            f"{ACCEPT_WEAK}: the report says so then."
        )


def check_quality(
    task: TaskFile,
    before: Evaluation,
    after: Evaluation,
    max_drop: float | None,
    vocabulary: int,
) -> QualityReport:
    """Compare scores, and check that the drop is within its limit.

    Args:
        task: The held-out examples.
        before: Score of the checkpoint.
        after: Score of the exported graph.
        max_drop: Largest drop allowed, by the upper end of its 95% interval, as
            `edgemoe.evaluate.gate` judges it; None for any.
        vocabulary: Tokens that the model chooses from.

    Returns:
        The entry of the manifest.

    Raises:
        QualityGateError: The drop may be larger.
    """
    judged = judge_drop(before, after, vocabulary)
    if max_drop is not None and not judged.holds(max_drop):
        raise QualityGateError(
            f"{before.metric} of task {task.name} must get worse by at most --max-drop "
            f"{max_drop:g} with 95% confidence, got {judged}: from {_show(before)} to "
            f"{_show(after)}. No bundle was written. Keep more experts (--keep, or --keep auto "
            "for the deepest cut that holds), recover them (--recover least-squares), choose a "
            "higher --precision, or allow a larger --max-drop."
        )
    return describe_quality(task, before, after, max_drop, judged)


def describe_quality(
    task: TaskFile,
    before: Evaluation,
    after: Evaluation,
    max_drop: float | None,
    judged: JudgedDrop,
) -> QualityReport:
    """Return the entry of the manifest.

    Args:
        task: The held-out examples.
        before: Score of the checkpoint.
        after: Score of the exported graph.
        max_drop: The limit that held; None where there was none.
        judged: The drop.

    Returns:
        The entry.
    """
    return QualityReport(
        before=before.to_dict(),
        after=after.to_dict(),
        data=DataInfo(file=task.path.name, sha256=task.sha256, lines=after.n),
        max_drop=max_drop,
        passed=None if max_drop is None else True,
        drop=judged.to_json(),
    )


def _show(score: Evaluation) -> str:
    low, high = score.ci95
    return f"{score.value:.4g} [{low:.4g}, {high:.4g}]"
