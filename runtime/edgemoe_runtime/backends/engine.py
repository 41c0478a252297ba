"""The engine of a session: the best of its chain that still works.

An engine that works when it is opened can fail later: a driver that resets, memory that another
process takes, a provider without a kernel for one shape. The next one of the chain is opened
then, gets the tokens that the failed one had, each with the cap that it ran with, and goes on:
the request is not lost, and what it answers is what the next engine would have answered from
the beginning.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, cast

import numpy as np

from edgemoe_runtime.backends.base import CacheMark
from edgemoe_runtime.backends.chain import open_first
from edgemoe_runtime.errors import BackendError
from edgemoe_runtime.fallback import Fallback

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from edgemoe_runtime.backends.base import (
        LogitArray,
        LogitRows,
        OpenRequest,
        TokenArray,
    )
    from edgemoe_runtime.backends.chain import Candidate

_LOG = logging.getLogger(__name__)


class Engine:
    """A `Backend` that steps down its chain when the engine in use fails.

    Attributes:
        fallbacks: engines that could not be opened or failed, with reasons, oldest first.
    """

    def __init__(self, chain: Sequence[Candidate], request: OpenRequest) -> None:
        """Open the first engine of the chain that works here.

        Raises:
            BackendError: when none does; the message gives every reason.
        """
        self._request = request
        self._backend, fallbacks = open_first(chain, request)
        self._rest = tuple(chain[len(fallbacks) + 1 :])
        self.fallbacks: tuple[Fallback, ...] = fallbacks
        # What is in the cache, run by run: marks are of one engine, tokens of all.
        self._history: list[tuple[TokenArray, TokenArray]] = []
        self._opened = 0
        self._dead = ""

    @property
    def name(self) -> str:
        """Engine and provider in use."""
        return self._backend.name

    @property
    def chunk_tokens(self) -> int:
        """Most tokens that one `run` takes."""
        return self._backend.chunk_tokens

    @property
    def max_length(self) -> int:
        """Most tokens that the cache of the engine in use holds."""
        return self._backend.max_length

    @property
    def length(self) -> int:
        """Tokens in the cache."""
        return self._backend.length

    def run(self, token_ids: TokenArray, k_cap: TokenArray, rows: LogitRows) -> LogitArray:
        """Run tokens, on the next engine where this one fails; see `Backend.run`.

        Raises:
            BackendError: when no engine of the chain is left.
        """
        self._check_alive()
        try:
            logits = self._run(token_ids, k_cap, rows)
        except BackendError as error:
            self._step_down(error)
            return self.run(token_ids, k_cap, rows)
        self._history.append((np.array(token_ids), np.array(k_cap)))
        return logits

    def experts_used(self) -> TokenArray | None:
        """See `Backend.experts_used`."""
        return self._backend.experts_used()

    def mark(self) -> CacheMark:
        """See `Backend.mark`."""
        self._check_alive()
        inner = self._backend.mark()
        return CacheMark(inner.length, (self._opened, inner))

    def rewind(self, mark: CacheMark) -> None:
        """See `Backend.rewind`; an engine that came after the mark runs the tokens again."""
        self._check_alive()
        opened, inner = cast("tuple[int, CacheMark]", mark.state)
        self._forget_after(mark.length)
        if opened == self._opened:
            self._backend.rewind(inner)
            return
        try:
            self._replay()
        except BackendError as error:
            self._step_down(error)

    def reset(self) -> None:
        """Forget all tokens."""
        self._check_alive()
        self._history.clear()
        self._backend.reset()

    def close(self) -> None:
        """Free the engine; calling it twice is allowed."""
        self._backend.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _check_alive(self) -> None:
        if self._dead:
            raise BackendError(self._dead)

    def _run(self, token_ids: TokenArray, k_cap: TokenArray, rows: LogitRows) -> LogitArray:
        size = self._backend.chunk_tokens
        if len(token_ids) <= size:
            return self._backend.run(token_ids, k_cap, rows)
        # The engine before took longer chunks.
        parts = [token_ids[first : first + size] for first in range(0, len(token_ids), size)]
        if rows != "all":
            for part in parts[:-1]:
                self._backend.run(part, k_cap, "none")
            return self._backend.run(parts[-1], k_cap, rows)
        return np.concatenate(
            [np.array(self._backend.run(part, k_cap, rows)) for part in parts]
        )

    def _step_down(self, error: BackendError) -> None:
        """Open the next engine and give it what the failed one had.

        Raises:
            BackendError: when none is left, or none of the rest can be opened; the failed one
                stays open if it was the last, and the session ends with it otherwise.
        """
        if not self._rest:
            raise error
        fallback = Fallback(self._backend.name, f"failed while it ran: {error}")
        _LOG.warning("%s; going on with the next engine", fallback)
        self.fallbacks = (*self.fallbacks, fallback)
        # First: on a device there is memory for one engine at a time.
        self._backend.close()
        rest, self._rest = self._rest, ()
        try:
            self._backend, skipped = open_first(rest, self._request)
        except BackendError as none:
            self._dead = f"{fallback}\n{none}"
            raise BackendError(self._dead) from error
        self._rest = rest[len(skipped) + 1 :]
        self.fallbacks = (*self.fallbacks, *skipped)
        self._opened += 1
        needed = sum(len(tokens) for tokens, _ in self._history) + 1
        if self._backend.max_length < needed:
            self._step_down(
                BackendError(
                    f"an engine must hold the {needed} tokens of the request under way, got one"
                    f" for {self._backend.max_length}."
                )
            )
            return
        try:
            self._replay()
        except BackendError as another:
            self._step_down(another)

    def _replay(self) -> None:
        self._backend.reset()
        for tokens, k_cap in self._history:
            self._run(tokens, k_cap, "none")

    def _forget_after(self, length: int) -> None:
        kept = 0
        for position, (tokens, k_cap) in enumerate(self._history):
            if kept + len(tokens) > length:
                rest = tokens[: length - kept]
                del self._history[position:]
                if len(rest):
                    self._history.append((rest, k_cap))
                return
            kept += len(tokens)
