"""Score with a transformers model, dense or Mixture-of-Experts, run eagerly."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from edgemoe.errors import CheckpointError
from edgemoe.evaluate.experts_used import ExpertCount
from edgemoe.models.contract import MoeModel
from edgemoe.models.hooks import limit_k
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from edgemoe.evaluate.scorer import Logprobs, Request

BATCH_TOKENS = 512
_CACHE_TOKENS = 4096
_ROWS_AT_ONCE = 64
_PAD = 0


class TorchScorer:
    """Scores with a model in memory.

    Sequences of one continuation are sorted by length and padded on the right into batches of
    at most 512 tokens. A causal model's tokens never see what is on their right, so padding
    changes a result by the rounding of float32 at most. Several continuations of one context
    are run together after it, from its KV cache, and with nothing else.
    """

    def __init__(
        self,
        model: MoeModel | PreTrainedModel,
        *,
        k_cap: int | Sequence[int] | None = None,
        batch_tokens: int = BATCH_TOKENS,
    ) -> None:
        """Wrap a model.

        Args:
            model: A Mixture-of-Experts model, or a transformers model that has no experts.
            k_cap: Most experts per token, one for all MoE layers or one for each.
            batch_tokens: Tokens of a batch, padding included; one longer sequence is a
                batch of its own.

        Raises:
            CheckpointError: ``k_cap`` is given for a model without experts.
            EdgemoeError: ``k_cap`` is out of range.
        """
        self._moe = model if isinstance(model, MoeModel) else None
        self._model: Any = model.model if isinstance(model, MoeModel) else model
        self._k_cap = k_cap
        self._batch_tokens = batch_tokens
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

        None for a dense model, and before anything was scored where k depends on the token.
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
        with torch.inference_mode(), self._capped(), self._counting():
            for batch in track(make_batches(requests, self._batch_tokens), "evaluate"):
                if len(requests[batch[0]].continuations) > 1:
                    results[batch[0]] = self._score_choices(requests[batch[0]])
                    continue
                chosen = [requests[index] for index in batch]
                for index, logprobs in zip(batch, self._score_batch(chosen), strict=True):
                    results[index] = [logprobs]
        return results

    def generate(self, ids: Sequence[int], max_new_tokens: int) -> list[int]:
        """Continue a prompt, the most likely token each time.

        Args:
            ids: Token ids of the prompt, at least one.
            max_new_tokens: Most tokens to make, in [1, inf).

        Returns:
            The token ids that follow, without the end token.
        """
        own = self._model.generation_config
        ends = own.eos_token_id
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=_PAD
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

    def _capped(self) -> contextlib.AbstractContextManager[None]:
        if self._moe is None or self._k_cap is None:
            return contextlib.nullcontext()
        return limit_k(self._moe, self._k_cap)

    def _counting(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._count is None else self._count.counting()

    def _score_batch(self, requests: list[Request]) -> list[Logprobs]:
        """Score requests of one continuation each, padded on the right."""
        rows = [request.context + request.continuations[0] for request in requests]
        # Position t predicts token t + 1, so the last token of a row is never an input.
        ids = self._pad([row[:-1] for row in rows])
        first = min(len(request.context) for request in requests) - 1
        logits = self._model(
            input_ids=ids, use_cache=False, logits_to_keep=ids.shape[1] - first
        ).logits
        scored = []
        for row, request, row_logits in zip(rows, requests, logits, strict=True):
            start = len(request.context) - 1 - first
            targets = row[len(request.context) :]
            scored.append(gather(row_logits[start : start + len(targets)], targets))
        return scored

    def _score_choices(self, request: Request) -> list[Logprobs]:
        """Run the context once, then its continuations from the context's cache."""
        head = self._model(
            input_ids=self._pad([request.context]), use_cache=True, logits_to_keep=1
        )
        first_logits = head.logits[0, -1:]
        if max(map(len, request.continuations)) == 1:
            return [gather(first_logits, choice) for choice in request.continuations]
        rows = max(1, _CACHE_TOKENS // request.longest)
        scored: list[Logprobs] = []
        for start in range(0, len(request.continuations), rows):
            choices = request.continuations[start : start + rows]
            cache = copy.deepcopy(head.past_key_values)
            cache.batch_repeat_interleave(len(choices))
            ids = self._pad([choice[:-1] for choice in choices])
            if ids.shape[1] == 0:
                scored += [gather(first_logits, choice) for choice in choices]
                continue
            logits = self._model(input_ids=ids, past_key_values=cache, use_cache=True).logits
            scored += [
                gather(torch.cat([first_logits, row[: len(choice) - 1]]), choice)
                for row, choice in zip(logits, choices, strict=True)
            ]
        return scored

    def _pad(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        if self._count is not None:
            self._count.real = real_tokens(rows)
        return pad(rows).to(self._model.device)


def pad(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Make a batch of rows of token ids, padded on the right, int64 [rows, longest]."""
    width = max(map(len, rows))
    padded = [[*row, *[_PAD] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.int64)


def real_tokens(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return which tokens of a padded batch are no padding, bool [rows, longest]."""
    lengths = torch.tensor([len(row) for row in rows])
    return torch.arange(int(lengths.max())) < lengths[:, None]


def make_batches(requests: Sequence[Request], batch_tokens: int) -> list[list[int]]:
    """Group requests by length; those with several continuations stay alone.

    Args:
        requests: What is to be scored.
        batch_tokens: Tokens of a batch, padding included.

    Returns:
        Positions of the requests of each batch.
    """
    alone: list[list[int]] = []
    batches: list[list[int]] = []
    open_width = 0
    for index in sorted(range(len(requests)), key=lambda index: -requests[index].longest):
        request = requests[index]
        if len(request.continuations) > 1:
            alone.append([index])
        # The first of a batch is its longest, so it sets the width of all.
        elif open_width and (len(batches[-1]) + 1) * open_width <= batch_tokens:
            batches[-1].append(index)
        else:
            batches.append([index])
            open_width = request.longest
    return alone + batches


def gather(logits: torch.Tensor, targets: Sequence[int]) -> Logprobs:
    """Pick the log-probability of one token per row.

    Args:
        logits: Logits [tokens, vocabulary].
        targets: The tokens.

    Returns:
        log softmax(logits)[t, targets[t]], float64 [tokens].
    """
    ids = torch.tensor(targets, dtype=torch.int64, device=logits.device)
    parts = []
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = logits[start : start + _ROWS_AT_ONCE].double()
        chosen = rows.gather(1, ids[start : start + _ROWS_AT_ONCE, None])[:, 0]
        parts.append(chosen - rows.logsumexp(dim=-1))
    scored: Logprobs = torch.cat(parts).cpu().numpy()
    return scored
