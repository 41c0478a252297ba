"""Token-level work on a backend: prompts in chunks, steps, and log-likelihoods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe_runtime.adaptive_k.k_cap import experts_per_token
from edgemoe_runtime.decoding.sampling import FloatArray, NotFiniteError, log_probabilities
from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe_runtime.backends.base import (
        Backend,
        CacheMark,
        LogitArray,
        LogitRows,
        TokenArray,
    )


class Decoder:
    """One backend together with the caps and limits of a session."""

    def __init__(
        self,
        backend: Backend,
        k_cap: Sequence[int],
        *,
        top_k: int,
        vocab_size: int,
        name_of: Callable[[int], str | None] = lambda _: None,
        half: bool = False,
        longest: int | None = None,
    ) -> None:
        """Take over an open engine.

        Args:
            backend: the engine.
            k_cap: experts per token at most, by MoE layer.
            top_k: experts per token that the graph has.
            vocab_size: tokens that the model has embeddings for.
            name_of: returns what a token is called, for messages.
            half: whether activations are in float16.
            longest: tokens that the model takes at most, for messages.
        """
        self._backend = backend
        self._k_cap = np.array(k_cap, dtype=np.int64)
        self._top_k = top_k
        self._vocab_size = vocab_size
        self._name_of = name_of
        self._half = half
        self._longest = longest
        self._experts_used = 0
        self._tokens_run = 0

    def use_k_cap(self, k_cap: Sequence[int]) -> None:
        """Set the cap of experts per token for the requests that follow."""
        self.move_k_cap(k_cap)
        self._experts_used = self._tokens_run = 0

    def move_k_cap(self, k_cap: Sequence[int]) -> None:
        """Set the cap of experts per token for the runs that follow, within a request too."""
        self._k_cap = np.array(k_cap, dtype=np.int64)

    @property
    def max_length(self) -> int:
        """Tokens that the cache holds."""
        return self._backend.max_length

    @property
    def experts_per_token(self) -> float:
        """Experts that a token ran through per MoE layer, averaged.

        The mean over layers and over the tokens that ran since the cache was empty; before any
        did, what the caps allow.
        """
        if not self._tokens_run or not len(self._k_cap):
            return experts_per_token(self._k_cap.tolist(), self._top_k)
        return self._experts_used / (self._tokens_run * len(self._k_cap))

    def _begin(self) -> None:
        self._backend.reset()
        self._experts_used = self._tokens_run = 0

    def _run(self, tokens: TokenArray, rows: LogitRows) -> LogitArray:
        logits = self._backend.run(tokens, self._k_cap, rows)
        # an overflow is told by NaN in the last row, before anything is made of it
        if self._half and len(logits) and not np.isfinite(highest := logits[-1].max()):
            raise NotFiniteError(highest, "fp16")
        used = self._backend.experts_used()
        if used is None:
            # Every token uses what the caps allow.
            total = len(tokens) * int(np.minimum(self._k_cap, self._top_k).sum())
        else:
            total = int(used.sum())
        self._experts_used += total
        self._tokens_run += len(tokens)
        return logits

    @property
    def free(self) -> int:
        """Tokens that still fit into the cache."""
        return self.max_length - self._backend.length

    def prefill(self, ids: Sequence[int]) -> LogitArray:
        """Forget everything, run a prompt, and return the logits after its last token.

        Args:
            ids: at least one token id.

        Returns:
            float32 `[vocabulary]`; the next run may overwrite it.

        Raises:
            RequestError: when the prompt is empty or too long, or an id is unknown.
        """
        self.check(ids)
        self._begin()
        chunks = self._chunks(ids)
        for chunk in chunks[:-1]:
            self._run(chunk, "none")
        row: LogitArray = self._run(chunks[-1], "last")[0]
        return row

    def step(self, token: int) -> LogitArray:
        """Run one token and return the logits after it, float32 `[vocabulary]`."""
        ids = np.array([token], dtype=np.int64)
        row: LogitArray = self._run(ids, "last")[0]
        return row

    def mark(self) -> CacheMark:
        """Return the state of the cache."""
        return self._backend.mark()

    def continuation(
        self, mark: CacheMark, first: LogitArray, ids: Sequence[int]
    ) -> FloatArray:
        """Return the log-likelihood of each token of a continuation of the marked prompt.

        Args:
            mark: state after the prompt.
            first: float32 `[vocabulary]`, logits after the prompt, not to be a view of
                the backend's buffer.
            ids: the continuation, at least one token.

        Returns:
            float64 `[len(ids)]`.
        """
        self._backend.rewind(mark)
        targets = np.array(ids, dtype=np.int64)
        likely = [log_probabilities(first[None], targets[:1])]
        done = 1
        for chunk in self._chunks(ids[:-1]):
            logits = self._run(chunk, "all")
            likely.append(log_probabilities(logits, targets[done : done + len(chunk)]))
            done += len(chunk)
        return np.concatenate(likely)

    def token_logprobs(self, ids: Sequence[int], start: int) -> FloatArray:
        """Return log p(ids[t] | ids[:t]) for t from start on, float64 `[len(ids) - start]`.

        Raises:
            RequestError: when start is outside [1, len(ids)], the ids are too many, or an
                id is unknown.
        """
        # the last token is scored but never run
        self.check(ids, -1)
        if not 1 <= start <= len(ids):
            raise RequestError(
                f"start must be in [1, {len(ids)}] (the number of ids), got {start}: the first"
                " token has nothing before it."
            )
        self._begin()
        targets = np.array(ids, dtype=np.int64)
        likely: list[FloatArray] = [np.empty(0)]
        position = 0
        for chunk in self._chunks(ids[:-1]):
            first = max(start - 1 - position, 0)  # first row whose next token is wanted
            wanted = targets[position + 1 : position + 1 + len(chunk)][first:]
            logits = self._run(chunk, "all" if len(wanted) else "none")
            if len(wanted):
                likely.append(log_probabilities(logits[first:], wanted))
            position += len(chunk)
        return np.concatenate(likely)

    def check(self, ids: Sequence[int], extra: int = 0) -> None:
        """Refuse token ids that cannot be run.

        Args:
            ids: token ids.
            extra: further tokens that must fit; -1 where the last one is never run.

        Raises:
            RequestError: when there are none, too many, or unknown ones.
        """
        if not len(ids):
            raise RequestError("A prompt must be at least one token, got none. Give some text.")
        if len(ids) + extra > self.max_length:
            raise RequestError(
                f"Prompt and answer must fit into max_length {self.max_length} tokens, got"
                f" {len(ids) + extra}. {self._longer()}"
            )
        lowest, highest = min(ids), max(ids)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            name = self._name_of(wrong)
            called = "" if name is None else f" ({quote(name, 80)})"
            raise RequestError(
                f"token ids must be in [0, {self._vocab_size}), the tokens that the model has"
                f" embeddings for, got {wrong}{called}. Take that token out of the text: the"
                " tokenizer knows it, the model does not."
            )

    def _longer(self) -> str:
        if self._longest is not None and self.max_length >= self._longest:
            return "Shorten the prompt: the model takes no more."
        most = "the model's max_position_embeddings" if self._longest is None else self._longest
        return (
            f"Shorten the prompt, or open the session with a larger max_length, at most {most}:"
            " `--max-length` of `edgemoe run` and `edgemoe bench`."
        )

    def _chunks(self, ids: Sequence[int]) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
        array = np.array(ids, dtype=np.int64)
        size = self._backend.chunk_tokens
        return [array[first : first + size] for first in range(0, len(array), size)]
