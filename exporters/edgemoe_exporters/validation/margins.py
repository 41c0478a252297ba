"""How sure a graph is of its answers, line by line, and which of them a lower k changes.

An answer is the likeliest of a line's choices, or, where a line is text, the likeliest token at
each position. It leads by the difference between its log-likelihood and that of the second
best.
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

# A text counts as the same where so many of its tokens are.
_SAME = 0.75


@dataclass(frozen=True)
class Answers:
    """What is likeliest, line by line.

    Attributes:
        chosen: For each line the choice, int64 ``[1]``, or the tokens, int64 ``[positions]``.
        leads: How far they are ahead of the second best, in nats, on average over a line's
            positions, float64 ``[lines]``.
    """

    chosen: tuple[NDArray[np.int64], ...]
    leads: NDArray[np.float64]


class WatchingScorer(GraphScorer):
    """Scores with a graph, and remembers what was likeliest.

    Args:
        runner: The graph.
        k_cap: Most experts per token, for each MoE layer.
        max_length: Longest sequence in tokens.
    """

    def __init__(self, runner: Runner, k_cap: Sequence[int], max_length: int) -> None:
        super().__init__(runner, k_cap, max_length)
        self._seen: dict[Request, tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def see(self, request: Request, logits: np.ndarray[Any, np.dtype[np.float32]]) -> None:
        """Remember the likeliest tokens of the positions before a continuation."""
        second, best = np.partition(logits, -2, axis=-1)[:, -2:].T.astype(np.float64)
        self._seen[request] = (logits.argmax(-1), best - second)

    def answers(self, questions: Sequence[EvalExample]) -> Answers:
        """Return what was likeliest in the lines of a task of texts or completions.

        Args:
            questions: The lines that were scored.

        Returns:
            The likeliest tokens.
        """
        seen = [
            [self._seen[each] for each in one.requests] for one in questions if one.requests
        ]
        return Answers(
            chosen=tuple(np.concatenate([tokens for tokens, _ in line]) for line in seen),
            leads=np.array(
                [np.concatenate([lead for _, lead in line]).mean() for line in seen]
            ),
        )


def answers_of_choices(score: Evaluation) -> Answers:
    """Return what was likeliest in the lines of a task of choices.

    Args:
        score: Their score.

    Returns:
        The likeliest choices; the lead of an only choice is infinite.
    """
    ordered = [sorted(line)[-2:] for line in score.line_values]
    return Answers(
        chosen=tuple(np.array([int(np.argmax(line))]) for line in score.line_values),
        leads=np.array([line[1] - line[0] if len(line) > 1 else np.inf for line in ordered]),
    )


def find_margin(full: Answers, here: Answers) -> float:
    """Find how far ahead an answer must be to be that of the full k, on held-out lines.

    Args:
        full: Answers at the full k.
        here: Answers on a rung, of the same lines.

    Returns:
        The largest lead, in nats, among lines whose answer is another one at the full k: of
        texts, whose tokens are others in more than a quarter of the positions. Below 0 where
        there is no such line.
    """
    changed = [
        float(np.mean(before == after)) < _SAME
        for before, after in zip(full.chosen, here.chosen, strict=True)
    ]
    return float(max(here.leads[changed], default=-1.0))
