"""Score with a bundle, through the runtime that will serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.evaluate.scorer import Logprobs, Request


class SupportsTokenLogprobs(Protocol):
    """What of ``edgemoe_runtime.Session`` scoring needs."""

    def token_logprobs(self, ids: Sequence[int], start: int) -> Logprobs:
        """Return log p(ids[t] | ids[:t]) for t in [start, len(ids))."""
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
            [
                self._session.token_logprobs(
                    [*request.context, *continuation], len(request.context)
                )
                for continuation in request.continuations
            ]
            for request in track(requests, "evaluate", total=len(requests))
        ]
