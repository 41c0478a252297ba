"""Margins of a graph's answers, example by example, and which answers a lower k changes.

An answer is the likeliest of an example's choices, or, where an example is text, the likeliest
token at each position. Its margin is the difference between its log-likelihood and that of the
second best.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe_exporters.validation.graph_scorer import GraphScorer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.evaluate.requests import EvalExample
    from edgemoe.evaluate.scorer import Request
    from edgemoe_exporters.validation.graph_calls import Runner

# A text counts as the same where at least this fraction of its tokens is.
_SAME = 0.75


@dataclass(frozen=True)
class Answers:
    """The likeliest answers, example by example.

    Attributes:
        chosen: For each example the choice, int64 `[1]`, or the tokens, int64 `[positions]`.
        margins: Log-likelihood ahead of the second best, in nats, on average over an example's
            positions, float64 `[examples]`.
    """

    chosen: tuple[NDArray[np.int64], ...]
    margins: NDArray[np.float64]


class RecordingScorer(GraphScorer):
    """Scores with a graph, and records the likeliest tokens.

    Args:
        runner: The graph.
        k_cap: Most experts per token, for each MoE layer.
        max_length: Longest sequence in tokens.
    """

    def __init__(self, runner: Runner, k_cap: Sequence[int], max_length: int) -> None:
        super().__init__(runner, k_cap, max_length)
        self._seen: dict[Request, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def on_logits(
        self, request: Request, logits: np.ndarray[Any, np.dtype[np.float32]]
    ) -> None:
        """Record the likeliest tokens of the positions before a continuation."""
        second, best = np.partition(logits, -2, axis=-1)[:, -2:].T.astype(np.float64)
        self._seen[request] = (logits.argmax(-1), best - second)

    def answers(self, examples: Sequence[EvalExample]) -> Answers:
        """Return the likeliest tokens in the examples of a task of texts or completions.

        Args:
            examples: The examples that were scored.

        Returns:
            The likeliest tokens.
        """
        seen = [[self._seen[each] for each in one.requests] for one in examples if one.requests]
        return Answers(
            chosen=tuple(np.concatenate([tokens for tokens, _ in line]) for line in seen),
            margins=np.array(
                [np.concatenate([margin for _, margin in line]).mean() for line in seen]
            ),
        )


def answers_of_choices(score: Evaluation) -> Answers:
    """Return the likeliest choices in the examples of a task of choices.

    Args:
        score: Their score.

    Returns:
        The likeliest choices; the margin of an only choice is infinite.
    """
    ordered = [sorted(values)[-2:] for values in score.line_values]
    return Answers(
        chosen=tuple(np.array([int(np.argmax(values))]) for values in score.line_values),
        margins=np.array([line[1] - line[0] if len(line) > 1 else np.inf for line in ordered]),
    )


def find_margin(full: Answers, here: Answers) -> float:
    """Find the margin above which an answer is that of the full k, on held-out examples.

    Args:
        full: Answers at the full k.
        here: Answers on a rung, to the same examples.

    Returns:
        The largest margin, in nats, among examples whose answer differs from that at the full
        k: of texts, those whose tokens differ in more than a quarter of the positions. Below 0
        where there is no such example.
    """
    changed = [
        float(np.mean(before == after)) < _SAME
        for before, after in zip(full.chosen, here.chosen, strict=True)
    ]
    return float(max(here.margins[changed], default=-1.0))
