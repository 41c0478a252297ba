"""The quality gate: what `--max-drop` means, for every command that has it.

A change holds where the upper end of the 95% interval of its drop is at most the largest drop
allowed: with 95% confidence it costs no more. The interval is of pairs, the same lines before
and after (`edgemoe.evaluate.drop.paired_drop`). Where the evidence is too weak for any such
statement, fewer than 20 lines or a model that is not better than chance to begin with, there
is none unless somebody insists.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.evaluate.drop import Drop, paired_drop
from edgemoe.evaluate.requests import build_examples

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.tasks import Kind, TaskFile

MINIMUM_LINES = 20
"""Fewest lines that judge a drop: below, a bootstrap over lines is rough."""

ROUNDING = 1e-6
"""Tolerance of a drop's limit: an engine's sums round, and 0.8 - 0.75 is not 0.05."""

ACCEPT_WEAK = "--accept-weak-evidence"
ACCEPT_LARGE = "--accept-large-drop"


@dataclass(frozen=True, kw_only=True)
class JudgedDrop:
    """How much worse a score is, and what that is known from.

    Attributes:
        metric: `perplexity` or `accuracy`.
        drop: The drop and its 95% interval; the upper end is what a limit is compared with.
        lines: Lines that both scores are of.
        chance: Score of who knows nothing: the size of the vocabulary as a perplexity, or the
            accuracy of a choice at random.
        weak: Why the evidence is weak, a clause each; empty where it is not.
    """

    metric: str
    drop: Drop
    lines: int
    chance: float
    weak: tuple[str, ...] = ()

    def holds(self, max_drop: float) -> bool:
        """Return whether the drop is, with 95% confidence, at most `max_drop`."""
        return is_within(self.drop.ci95[1], max_drop)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "value": self.drop.value,
            "ci95": list(self.drop.ci95),
            "lines": self.lines,
            "chance": self.chance,
            "weak_evidence": list(self.weak),
        }

    def __str__(self) -> str:
        """Describe the drop, its interval, the lines and the chance level."""
        low, high = self.drop.ci95
        if self.metric == "perplexity":
            shown = f"{_percent(self.drop.value)}% perplexity, 95% interval {_percent(low)} to "
            shown += f"{_percent(high)}%"
        else:
            shown = f"{_percent(-self.drop.value)} points of accuracy, 95% interval "
            shown += f"{_percent(-high)} to {_percent(-low)}"
        return f"{shown}, {self.lines} held-out lines, chance {self.chance:.6g}"


def judge_drop(before: Evaluation, after: Evaluation, vocabulary: int) -> JudgedDrop:
    """Compare two scores of the same lines.

    Args:
        before: Score of the model before.
        after: Score of the model after.
        vocabulary: Tokens that the model chooses from.

    Returns:
        The drop, and how sure it is.

    Raises:
        ValueError: The scores are not of the same lines.
    """
    return JudgedDrop(
        metric=after.metric,
        drop=paired_drop(before, after),
        lines=after.n,
        chance=chance_level(before, vocabulary),
        weak=find_weaknesses(before, vocabulary),
    )


def is_within(upper: float, max_drop: float) -> bool:
    """Return whether the upper end of a drop's interval is within its limit.

    Args:
        upper: Upper end of the 95% interval; NaN is within nothing.
        max_drop: The largest drop allowed.

    Returns:
        Whether it is, up to rounding.
    """
    return upper <= max_drop + ROUNDING


def chance_level(score: Evaluation, vocabulary: int) -> float:
    """Return the score of who knows nothing.

    Args:
        score: Of any model, on the same lines.
        vocabulary: Tokens that the model chooses from.

    Returns:
        The perplexity of equally likely tokens, or the accuracy of a choice at random.
    """
    if score.metric == "accuracy":
        return float(score.details["accuracy_of_chance"])
    return float(vocabulary)


def find_weaknesses(before: Evaluation, vocabulary: int) -> tuple[str, ...]:
    """Find why a drop from this score would say little.

    Args:
        before: Score of the model before.
        vocabulary: Tokens that the model chooses from.

    Returns:
        A clause for each reason.
    """
    found = [lines_are_few(before.n)] if before.n < MINIMUM_LINES else []
    chance, (low, high) = chance_level(before, vocabulary), before.ci95
    knows = low > chance if before.metric == "accuracy" else high < chance
    if not knows:
        found.append(
            f"the {before.metric} of the model before, {before.value:.4g} [{low:.4g}, "
            f"{high:.4g}], is not better than chance, {chance:.6g}"
        )
    return tuple(found)


def lines_are_few(lines: int) -> str:
    """Return the clause for too few lines."""
    return f"{lines} lines judge, fewer than {MINIMUM_LINES}"


def count_judged(
    task: TaskFile, tokenizer: Tokenizer, *, max_length: int, max_tokens: int
) -> int:
    """Count the lines that a score would be of, without a model.

    Args:
        task: What is to be scored.
        tokenizer: The model's tokenizer.
        max_length: Most tokens that the model reads at once.
        max_tokens: Tokens that are read at most.

    Returns:
        The lines that have a token to score.

    Raises:
        TaskFileError: A line cannot be scored.
    """
    asked = build_examples(task, tokenizer, max_length=max_length, max_tokens=max_tokens)
    return sum(1 for example in asked if example.requests)


def find_limit_fault(max_drop: float, kind: Kind, *, accept_large: bool) -> str | None:
    """Find what is wrong with a limit before anything is measured.

    Args:
        max_drop: The largest drop allowed.
        kind: What the task's lines are.
        accept_large: Whether a perplexity may more than double.

    Returns:
        A message with its remedy; None where nothing is.
    """
    if not 0 <= max_drop < math.inf:
        return (
            f"--max-drop must be in [0, inf), got {max_drop:g}: 0.05 allows 5% more "
            "perplexity, or five points less accuracy."
        )
    if max_drop <= 1:
        return None
    percent = f"For {max_drop:g}% give {max_drop / 100:g}" if max_drop <= 100 else ""
    if kind == "choice":
        return (
            f"--max-drop must be in [0, 1] for a task of choices, got {max_drop:g}: it is the "
            f"fall of accuracy in points of 1. {percent or 'Leave it out for no gate'}."
        )
    if accept_large:
        return None
    return (
        f"--max-drop must be in [0, 1] for perplexity unless {ACCEPT_LARGE} is given, got "
        f"{max_drop:g}: {100 * max_drop:g}% more, {1 + max_drop:g} times the perplexity. "
        f"{percent or 'Leave it out for no gate'}."
    )


def _percent(value: float) -> str:
    return f"{100 * value:+,.0f}" if abs(value) >= 1 else f"{100 * value:+.3g}"
