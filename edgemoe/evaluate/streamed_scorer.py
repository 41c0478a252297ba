"""Score with a checkpoint that is larger than memory, one decoder layer at a time."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgemoe.evaluate.experts_used import ExpertCount
from edgemoe.evaluate.torch_scorer import (
    BATCH_TOKENS,
    gather,
    make_batches,
    pad,
    real_tokens,
)
from edgemoe.layerwise.runner import Batch, run_batches
from edgemoe.models.hooks import limit_k

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgemoe.evaluate.scorer import Logprobs, Request
    from edgemoe.layerwise.runner import Layer
    from edgemoe.models.opening import StreamedModel
    from edgemoe.resume import WorkDirectory


class StreamedScorer:
    """Scores as :class:`edgemoe.evaluate.torch_scorer.TorchScorer` does.

    Requests of one continuation run in the same batches, and give the same bits. Those of
    several run each with its context, since a layer that runs alone has no cache: they differ
    by the rounding of float32.
    """

    def __init__(
        self,
        streamed: StreamedModel,
        work: WorkDirectory,
        *,
        k_cap: int | Sequence[int] | None = None,
        inside: Layer = contextlib.nullcontext,
    ) -> None:
        """Wrap a checkpoint.

        Args:
            streamed: The checkpoint.
            work: For what layers returned.
            k_cap: Most experts per token, one for all MoE layers or one for each.
            inside: Makes a context that each decoder layer runs in, from its index; the layer's
                weights are in memory then, and may be others until it ends.

        Raises:
            EdgemoeError: ``k_cap`` is out of range.
        """
        self._k_cap = k_cap
        self._count = ExpertCount(streamed.moe, k_cap)
        self._streamed = streamed
        self._work = work
        self._inside = inside

    @property
    def max_length(self) -> int:
        """Most tokens that the model was built for."""
        config = self._streamed.moe.config
        return int(getattr(config, "max_position_embeddings", None) or 2**31)

    @property
    def experts_per_token(self) -> float | None:
        """Experts that the tokens scored so far used per MoE layer, averaged over both.

        A context counts with each of its continuations. None before anything was scored where
        k depends on the token.
        """
        return self._count.mean

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        """Score every continuation of every request.

        Args:
            requests: What to score.

        Returns:
            As :meth:`edgemoe.evaluate.torch_scorer.TorchScorer.score`.
        """
        # For each batch the requests and continuations that its rows are.
        rows: list[list[tuple[int, int]]] = []
        for members in make_batches(requests, BATCH_TOKENS):
            choices = len(requests[members[0]].continuations)
            if choices == 1:
                rows.append([(member, 0) for member in members])
            else:
                at_once = max(1, BATCH_TOKENS // requests[members[0]].longest)
                rows += [
                    [(members[0], choice) for choice in range(start, start + at_once)][
                        : choices - start
                    ]
                    for start in range(0, choices, at_once)
                ]
        batches, firsts, real = [], [], []
        for batch in rows:
            lines = [
                (requests[one].context + requests[one].continuations[choice])[:-1]
                for one, choice in batch
            ]
            ids = pad(lines)
            real.append(real_tokens(lines))
            first = min(len(requests[one].context) for one, _ in batch) - 1
            firsts.append(first)
            batches.append(Batch(ids, ids.shape[1] - first))
        results: list[list[Logprobs]] = [[] for _ in requests]

        def take(number: int, logits: torch.Tensor) -> None:
            for (one, choice), row in zip(rows[number], logits, strict=True):
                start = len(requests[one].context) - 1 - firsts[number]
                targets = requests[one].continuations[choice]
                results[one].append(gather(row[start : start + len(targets)], targets))

        def begin(number: int) -> None:
            self._count.real = real[number]

        moe, k_cap = self._streamed.moe, self._k_cap
        capped = contextlib.nullcontext() if k_cap is None else limit_k(moe, k_cap)
        with capped, self._count.counting():
            run_batches(
                self._streamed,
                batches,
                take,
                self._work,
                name="score",
                description="evaluate",
                inside=self._inside,
                on_batch=begin,
                state=self._count,
            )
        return results
