"""Score with a bundle, through the runtime that will serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.evaluate.scorer import Logprobs, Request


class SupportsTokenLogprobs(Protocol):
    """Methods of `edgemoe_runtime.Session` that scoring needs."""

    def token_logprobs(self, ids: Sequence[int], start: int) -> Logprobs:
        """Return log p(ids[t] | ids[:t]) for t in [start, len(ids))."""
        ...

    def explain(self) -> SupportsExpertsPerToken:
        """Return what the latest tokens used."""
        ...


class SupportsExpertsPerToken(Protocol):
    """Fields of `edgemoe_runtime.Explanation` that scoring needs."""

    @property
    def experts_per_token(self) -> float:
        """Experts per token and MoE layer of the latest tokens, averaged."""
        ...


class SessionScorer:
    """Scores with an open session, one sequence at a time."""

    def __init__(self, session: SupportsTokenLogprobs, *, max_length: int) -> None:
        """Wrap a session; closing it stays with whoever opened it.

        Args:
            session: An open session.
            max_length: Most tokens that its KV cache holds.
        """
        self._session = session
        self._max_length = max_length
        self._used, self._passed = 0.0, 0

    @property
    def max_length(self) -> int:
        """Most tokens that the session takes."""
        return self._max_length

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        """Score every continuation of every request.

        Args:
            requests: What to score.

        Returns:
            log p(token | all before it) in nats, float64 [tokens of the continuation], for each
            request and each of its continuations.
        """
        return [
            [self._score(request.context, one) for one in request.continuations]
            for request in track(requests, "evaluate", total=len(requests))
        ]

    @property
    def experts_per_token(self) -> float | None:
        """Experts that the tokens scored so far used per MoE layer, averaged over both.

        A context counts with each of its continuations. None before anything was scored.
        """
        return self._used / self._passed if self._passed else None

    def _score(self, context: Sequence[int], continuation: Sequence[int]) -> Logprobs:
        scored = self._session.token_logprobs([*context, *continuation], len(context))
        # The last token is scored but never run.
        ran = len(context) + len(continuation) - 1
        self._used += ran * self._session.explain().experts_per_token
        self._passed += ran
        return scored
