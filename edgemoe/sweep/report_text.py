"""What a sweep's findings are called, for people: numbers, sentences and the short table."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.evaluate.drop import Drop
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.sweep.outcome import Outcome, Row, Threshold

UNPRUNED = "unpruned"


def show_score(score: Evaluation) -> str:
    """Write a score and its 95% interval."""
    low, high = score.ci95
    return f"{score.value:.4g} [{low:.4g}, {high:.4g}]"


def show_drop(value: float, metric: str) -> str:
    """Write a drop: percent of perplexity, or points of accuracy."""
    return f"{_show_hundredths(value)}{'%' if metric == 'perplexity' else ' points'}"


def show_drop_interval(drop: Drop, metric: str) -> str:
    """Write a drop and its 95% interval."""
    low, high = map(_show_hundredths, drop.ci95)
    return f"{show_drop(drop.value, metric)} [{low}, {high}]"


def _show_hundredths(value: float) -> str:
    return f"{100 * value:+,.0f}" if abs(value) >= 1 else f"{100 * value:+.3g}"


def tell_threshold(outcome: Outcome, threshold: Threshold, folder: Path) -> str:
    """Describe in one sentence how deep a task may be cut.

    Args:
        outcome: What was found.
        threshold: The task's.
        folder: The report's directory, as the plan's file is to be named.

    Returns:
        A sentence that names the plan's file, or says that no cut holds.
    """
    limit = f"--max-drop {outcome.request.max_drop:g}"
    task = threshold.task
    if threshold.best is not None:
        row = outcome.row_at(task, threshold.best)
        return (
            f"{task}: the deepest cut under {limit} keeps {_show_kept(row)} by {row.series} "
            f"(--keep {row.keep:g}); its drop is "
            f"{show_drop_interval(row.drop, row.score.metric)} on {row.score.n} lines, chance "
            f"{outcome.chance(task):.6g}: {folder / str(row.plan)}"
        )
    if threshold.nearest is None:
        return f"{task}: nothing was cut. Give --keep a smaller fraction."
    row = outcome.row_at(task, threshold.nearest)
    upper = show_drop(threshold.nearest.upper, row.score.metric)
    return (
        f"{task}: no cut is under {limit} with 95% confidence; the nearest, {row.series} at "
        f"--keep {row.keep:g}, may drop by {upper} ({row.score.n} lines, chance "
        f"{outcome.chance(task):.6g})."
    )


def list_columns(outcome: Outcome) -> tuple[list[str], list[list[str]]]:
    """Write the short table: every cut on the task that chose it.

    Args:
        outcome: What was found.

    Returns:
        The headings, and the cells of each line.
    """
    several = len(outcome.request.tasks) > 1
    seeded = len({row.seed for row in outcome.own_rows}) > 1
    heading = ["task", "method", "keep", *(["seed"] if seeded else []), "experts", "size"]
    heading += ["score [95%]", "drop [95%]", *(["worst other task"] if several else [])]
    lines = []
    for task in outcome.request.tasks:
        own = [row for row in outcome.own_rows if row.task == task]
        whole = next(row for row in outcome.rows if row.plan is None and row.judged_on == task)
        lines += [_cells(outcome, row, seeded=seeded, several=several) for row in (whole, *own)]
    return heading, lines


def _show_kept(row: Row) -> str:
    if row.prunes_width:
        return f"{row.kept_fraction:.1%} of the experts' parameters"
    return f"{row.experts} of {row.experts_before} experts"


def _cells(outcome: Outcome, row: Row, *, seeded: bool, several: bool) -> list[str]:
    whole = row.plan is None
    cells = [row.judged_on, row.series or UNPRUNED, "" if whole else f"{row.keep:g}"]
    if seeded:
        cells.append("" if whole else str(row.seed))
    experts = f"{row.experts}/{row.experts_before}"
    if row.prunes_width:
        experts += f" at {row.kept_fraction:.0%}"
    cells += [experts, f"{row.checkpoint_bytes / 1e6:.1f} MB"]
    cells.append(show_score(row.score))
    cells.append("" if whole else show_drop_interval(row.drop, row.score.metric))
    if several:
        other = outcome.worst_other(row)
        cells.append(
            ""
            if other is None
            else f"{other.judged_on} {show_drop(other.drop.value, other.score.metric)}"
        )
    return cells
