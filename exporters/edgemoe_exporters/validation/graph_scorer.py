"""Score with a written graph."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe_exporters.validation.graph_calls import Call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.evaluate.scorer import Logprobs, Request
    from edgemoe_exporters.validation.graph_calls import Runner


class GraphScorer:
    """Log-probabilities by a written graph, as `edgemoe.evaluate.scorer.Scorer`.

    Args:
        runner: The graph.
        k_cap: Most experts per token, for each MoE layer.
        max_length: Longest sequence in tokens.
    """

    def __init__(self, runner: Runner, k_cap: Sequence[int], max_length: int) -> None:
        self._runner = runner
        self._k_cap = tuple(k_cap)
        self._max_length = max_length

    @property
    def max_length(self) -> int:
        """Most tokens that the graph reads at once."""
        return self._max_length

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        """Score every continuation of every request; a context is read once.

        Args:
            requests: The requests.

        Returns:
            For each request and each of its continuations log p(token | all before it), in
            nats, float64 `[tokens of the continuation]`.
        """
        calls: list[Call] = []
        # By call: the request, the positions before the continuation, and the continuation.
        wanted: dict[int, tuple[int, int, tuple[int, ...]]] = {}
        for index, request in enumerate(requests):
            cut = len(request.context) - 1
            context: int | None = None
            skipped = cut
            if cut and len(request.continuations) > 1:
                context, skipped = len(calls), 0
                calls.append(Call(np.array([request.context[:cut]], np.int64)))
            else:
                cut = 0
            for continuation in request.continuations:
                ids = np.array([*request.context[cut:], *continuation], np.int64)
                wanted[len(calls)] = (index, skipped, continuation)
                calls.append(Call(ids[None, :-1], context))
        answers: list[list[Logprobs]] = [[] for _ in requests]

        def take(number: int, logits: np.ndarray[Any, np.dtype[np.float32]]) -> None:
            if number in wanted:
                index, skipped, continuation = wanted[number]
                rows = logits[0, skipped:]
                self.on_logits(requests[index], rows)
                answers[index].append(_pick(rows, np.array(continuation)))

        self._runner.run_calls(calls, self._k_cap, take)
        return answers

    def on_logits(
        self, request: Request, logits: np.ndarray[Any, np.dtype[np.float32]]
    ) -> None:
        """Receive the logits of a continuation's positions; does nothing here.

        Args:
            request: The request of the continuation.
            logits: Float32 `[tokens of the continuation, vocabulary]`.
        """


def _pick(
    logits: np.ndarray[Any, np.dtype[np.float32]], ids: np.ndarray[Any, np.dtype[np.int64]]
) -> Logprobs:
    """Return log p of one token per row; logits [rows, vocabulary], ids [rows]."""
    largest = logits.max(-1)
    total = np.exp(logits - largest[:, None]).sum(-1, dtype=np.float64)
    picked = logits[np.arange(len(ids)), ids].astype(np.float64)
    result: Logprobs = picked - largest - np.log(total)
    return result
