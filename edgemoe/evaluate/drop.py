"""How much worse one score is than another, of the same lines.

A drop is what `--max-drop` limits: the relative rise of a perplexity, the fall of an
accuracy in points of 1. Both models read the same lines, and most of what makes a line hard is
the same for both, so the interval is of pairs: lines are resampled, and each resample scores
both models. It is much narrower than the intervals of the two scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.evaluate.intervals import (
    bootstrap_mean,
    bootstrap_perplexity,
    expanded_percentiles,
    wilson_interval,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from edgemoe.evaluate.evaluation import Evaluation


@dataclass(frozen=True)
class Drop:
    """Difference of two scores, and its confidence interval.

    Attributes:
        value: As `measure_drop` counts it.
        ci95: Its 95% interval.
    """

    value: float
    ci95: tuple[float, float]


def measure_drop(before: Evaluation, after: Evaluation) -> float:
    """Return how much worse a score is.

    Args:
        before: Score of the one model.
        after: Score of the other, of the same lines.

    Returns:
        Perplexity: its relative rise, 0.05 for 5%. Accuracy: its absolute fall, 0.05 for five
        points. Negative where the score is better.
    """
    if before.metric == "perplexity":
        return after.value / before.value - 1
    return before.value - after.value


def paired_drop(before: Evaluation, after: Evaluation) -> Drop:
    """Return how much worse a score is, and within which limits.

    A bootstrap over lines, wider where they are few
    (`edgemoe.evaluate.intervals.expanded_percentiles`). Of an accuracy of which few lines
    changed it is still too sure (a resample of lines that all stayed right has none that went
    wrong), so there each end is at least as far from the value as Wilson's interval of the
    share of lines that changed its way: of lines that went wrong for the upper end, of lines
    that became right for the lower.

    Args:
        before: Perplexity or accuracy of the one model.
        after: That of the other, of the same lines.

    Returns:
        The drop.

    Raises:
        ValueError: The two are not of the same lines.
    """
    if (before.metric, before.line_tokens) != (after.metric, after.line_tokens):
        raise ValueError("two scores must be of the same lines to be compared")
    value = measure_drop(before, after)
    percentiles = expanded_percentiles(after.n)
    if before.metric == "perplexity":
        losses = np.array(after.line_losses) - np.array(before.line_losses)
        tokens = np.array(before.line_tokens, np.float64)
        low, high = bootstrap_perplexity(losses, tokens, percentiles=percentiles)
        return Drop(value, (low - 1, high - 1))
    lost = np.array(before.line_hits, np.float64) - np.array(after.line_hits)
    low, high = bootstrap_mean(lost, percentiles=percentiles)
    return Drop(
        value,
        (min(low, value - _reach(lost < 0)), max(high, value + _reach(lost > 0))),
    )


def _reach(changed: NDArray[np.bool_]) -> float:
    """Return how far the upper end of Wilson's interval is from a share of lines."""
    count, lines = int(changed.sum()), len(changed)
    return wilson_interval(count, lines)[1] - count / lines
