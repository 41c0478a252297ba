"""What evaluation asks of a model: log-probabilities of continuations of a context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

Logprobs: TypeAlias = "NDArray[np.float64]"


@dataclass(frozen=True)
class Request:
    """A context and the continuations to judge after it.

    Attributes:
        context: Token ids, at least one.
        continuations: Token ids of each continuation, at least one of each.
    """

    context: tuple[int, ...]
    continuations: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if not self.context or not self.continuations or not all(self.continuations):
            raise ValueError(f"contexts and continuations must not be empty, got {self}")

    @property
    def longest(self) -> int:
        """Tokens of the context and the longest continuation."""
        return len(self.context) + max(map(len, self.continuations))


class Scorer(Protocol):
    """A model that can say how likely tokens are."""

    @property
    def max_length(self) -> int:
        """Most tokens that the model reads at once.

        A continuation's last token is scored but never read, so a context and a continuation
        may have one more together.
        """
        ...

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        """Score every continuation of every request.

        Args:
            requests: What to score. A request's result does not depend on the others.

        Returns:
            For each request and each of its continuations log p(token | all before it), in
            nats, float64 [tokens of the continuation].
        """
        ...


def token_logprobs(scorer: Scorer, ids: Sequence[int], start: int) -> Logprobs:
    """Score the tokens of one sequence from `start` on.

    Args:
        scorer: The model.
        ids: Token ids.
        start: First token to score, in [1, len(ids)).

    Returns:
        log p(ids[t] | ids[:t]) for t in [start, len(ids)), float64 [len(ids) - start].

    Raises:
        ValueError: `start` is out of range: the first token has no context.
    """
    if not 1 <= start < len(ids):
        raise ValueError(f"start must be in [1, {len(ids)}), got {start}")
    request = Request(tuple(ids[:start]), (tuple(ids[start:]),))
    return scorer.score([request])[0][0]
