"""Score with a transformers model, dense or Mixture-of-Experts, run eagerly."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.batches import (
    BATCH_TOKENS,
    PAD,
    ScoreBatch,
    gather,
    make_batches,
    pad,
    real_tokens,
)
from edgemoe.evaluate.experts_used import ExpertCount
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.layerwise.runner import LayerTask, run_layers
from edgemoe.models.contract import MoeModel
from edgemoe.models.decoder import cache_name
from edgemoe.models.hooks import limit_k
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager

    from transformers import PreTrainedModel

    from edgemoe.evaluate.scorer import Logprobs, Request
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.resume import WorkDirectory

_CACHE_TOKENS = 4096


class TorchScorer:
    """Scores with a model that is in memory, or with a checkpoint that is larger.

    Sequences of one continuation are sorted by length and padded on the right into batches of
    at most 512 tokens. A causal model's tokens never see what is on their right, so padding
    changes a result by the rounding of float32 at most. Several continuations of one context
    are run together after it, from its KV cache, and with nothing else. Of a checkpoint that is
    read layer by layer they run each with its context, since a layer that runs alone has no
    cache, and differ by the rounding of float32; all else gives the same bits.
    """

    def __init__(
        self,
        model: MoeModel | PreTrainedModel | LayerProvider,
        *,
        k_cap: int | Sequence[int] | None = None,
        batch_tokens: int = BATCH_TOKENS,
        work: WorkDirectory | None = None,
    ) -> None:
        """Wrap a model.

        Args:
            model: A Mixture-of-Experts model, a transformers model that has no experts, or
                what holds the layers of a Mixture-of-Experts checkpoint.
            k_cap: Most experts per token, one for all MoE layers or one for each.
            batch_tokens: Tokens of a batch, padding included; one longer sequence is a
                batch of its own.
            work: For what the layers of a larger checkpoint returned; nothing is left there.

        Raises:
            CheckpointError: `k_cap` is given for a model without experts.
            EdgemoeError: `k_cap` is out of range.
        """
        self._moe: MoeModel | None = None
        self._layers: LayerProvider
        if isinstance(model, MoeModel):
            self._moe, self._layers = model, InMemoryLayers(model)
        elif isinstance(model, torch.nn.Module):
            self._layers = InMemoryLayers(model)
        else:
            self._moe, self._layers = model.moe, model
        self._model: Any = self._layers.model
        self._k_cap = k_cap
        self._batch_tokens = batch_tokens
        self._work = work
        if k_cap is not None and self._moe is None:
            raise CheckpointError(
                f"k_cap needs a Mixture-of-Experts model, got {k_cap} for a dense one. "
                "Leave --k-cap out."
            )
        self._count = None if self._moe is None else ExpertCount(self._moe, k_cap)

    @property
    def max_length(self) -> int:
        """Most tokens that the model was built for."""
        return int(getattr(self._model.config, "max_position_embeddings", None) or 2**31)

    @property
    def experts_per_token(self) -> float | None:
        """Experts that the tokens scored so far used per MoE layer, averaged over both.

        None for a dense model, and before anything was scored where k depends on the token. A
        context that runs with each of its continuations counts with each.
        """
        return None if self._count is None else self._count.mean

    def score(self, requests: Sequence[Request]) -> list[list[Logprobs]]:
        """Score every continuation of every request.

        Args:
            requests: What to score.

        Returns:
            log p(token | all before it) in nats, float64 [tokens of the continuation], for each
            request and each of its continuations.
        """
        results: list[list[Logprobs]] = [[] for _ in requests]
        batches: list[ScoreBatch] = []
        cached: list[int] = []
        for members in make_batches(requests, self._batch_tokens):
            choices = len(requests[members[0]].continuations)
            if choices == 1:
                batches.append(ScoreBatch(requests, [(member, 0) for member in members]))
            elif self._layers.is_whole:
                cached += members
            else:
                at_once = max(1, self._batch_tokens // requests[members[0]].longest)
                batches += [
                    ScoreBatch(
                        requests,
                        [(members[0], n) for n in range(start, min(start + at_once, choices))],
                    )
                    for start in range(0, choices, at_once)
                ]

        def take(number: int, logits: torch.Tensor) -> None:
            for one, logprobs in batches[number].gather(logits):
                results[one].append(logprobs)

        with self._capped(), self._counting():
            with torch.inference_mode():
                for one in track(cached, "evaluate"):
                    results[one] = self._score_choices(requests[one])
            run_layers(
                self._layers,
                [batch.batch for batch in batches],
                _Watch(self._count, [batch.real for batch in batches]),
                description="evaluate",
                take=take,
                work=self._work,
                name="score",
            )
        return results

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue a prompt, the most likely token each time.

        Args:
            ids: Token ids of the prompt, at least one.
            max_new_tokens: Most tokens to make, in [1, inf).

        Returns:
            The token ids that follow, without the end token.

        Raises:
            CheckpointError: The checkpoint is larger than memory.
        """
        if not self._layers.is_whole:
            raise CheckpointError(
                "a checkpoint must fit into memory to generate, got one that is larger: each "
                "token would read all of it. Judge completions by perplexity, or export it and "
                "judge the bundle."
            )
        own = self._model.generation_config
        ends = own.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=PAD
        )
        prompt = self._pad([ids])
        # transformers fills the gaps of what it is given from the model's own settings, which
        # may punish repetition or suppress tokens.
        self._model.generation_config = GenerationConfig()
        try:
            with torch.inference_mode(), self._capped():
                made = self._model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
                )
        finally:
            self._model.generation_config = own
        stops = {ends} if isinstance(ends, int) else set(ends or ())
        new: list[int] = made[0, len(ids) :].tolist()
        return new[:-1] if new and new[-1] in stops else new

    def _capped(self) -> AbstractContextManager[None]:
        if self._moe is None or self._k_cap is None:
            return contextlib.nullcontext()
        return limit_k(self._moe, self._k_cap)

    def _counting(self) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._count is None else self._count.counting()

    def _score_choices(self, request: Request) -> list[Logprobs]:
        """Run the context once, then its continuations from the context's cache."""
        head = self._model(
            input_ids=self._pad([request.context]), use_cache=True, logits_to_keep=1
        )
        first_logits = head.logits[0, -1:]
        if max(map(len, request.continuations)) == 1:
            return [gather(first_logits, choice) for choice in request.continuations]
        name = cache_name(self._model)
        rows = max(1, _CACHE_TOKENS // request.longest)
        scored: list[Logprobs] = []
        for start in range(0, len(request.continuations), rows):
            choices = request.continuations[start : start + rows]
            cache = copy.deepcopy(getattr(head, name))
            cache.batch_repeat_interleave(len(choices))
            ids = self._pad([choice[:-1] for choice in choices])
            if ids.shape[1] == 0:
                scored += [gather(first_logits, choice) for choice in choices]
                continue
            logits = self._model(input_ids=ids, use_cache=True, **{name: cache}).logits
            scored += [
                gather(torch.cat([first_logits, row[: len(choice) - 1]]), choice)
                for row, choice in zip(logits, choices, strict=True)
            ]
        return scored

    def _pad(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        if self._count is not None:
            self._count.real = real_tokens(rows)
        return pad(rows).to(self._model.device)


class _Watch(LayerTask):
    """Counts the experts that real tokens use."""

    watches = True

    def __init__(self, count: ExpertCount | None, real: Sequence[torch.Tensor]) -> None:
        self._count, self._real = count, real

    def before_batch(self, number: int) -> None:
        if self._count is not None:
            self._count.real = self._real[number]

    def state(self, index: int) -> dict[str, torch.Tensor]:
        del index
        return {} if self._count is None else self._count.to_tensors()

    def restore(self, index: int, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        del index
        if self._count is not None:
            self._count.restore(read())
