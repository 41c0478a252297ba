"""The contract of an inference engine: one opened graph with its key-value cache, batch 1."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from edgemoe_runtime.bundle.manifest import Manifest

TokenArray = NDArray[np.int64]
LogitArray = NDArray[np.float32]
LogitRows = Literal["none", "last", "all"]

_LOGIT_BUFFER_BYTES = 64 << 20  # 64 MiB of logits at most in one run
_MAX_CHUNK_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class OpenRequest:
    """Arguments of opening an engine.

    Attributes:
        bundle: directory of a verified bundle.
        manifest: its manifest.
        task: name of the task.
        max_length: tokens that the key-value cache shall hold.
        needs_length: whether fewer are no use, because the caller named the number.
        threads: CPU threads within an operator; None lets the backend choose.
        provider: onnxruntime execution provider, or None.
    """

    bundle: Path
    manifest: Manifest
    task: str
    max_length: int
    threads: int | None
    provider: str | None = None
    needs_length: bool = False

    @property
    def graph(self) -> Path:
        """Path of the task's ONNX file."""
        return self.bundle / self.manifest.tasks[self.task].graph

    def with_provider(self, provider: str | None) -> OpenRequest:
        """Return the same request for another provider."""
        return replace(self, provider=provider)

    @property
    def chunk_tokens(self) -> int:
        """Tokens per run that keep the logits of a run within their buffer."""
        fitting = _LOGIT_BUFFER_BYTES // (4 * self.manifest.model.vocab_size)
        return max(1, min(fitting, _MAX_CHUNK_TOKENS, self.max_length))


@dataclass(frozen=True)
class CacheMark:
    """A state of a backend's cache that it can go back to; `state` is the backend's own."""

    length: int
    state: object


class Backend(Protocol):
    """One opened graph. Use it as a context manager, or close it."""

    @property
    def name(self) -> str:
        """Engine and provider, such as "onnxruntime:CPUExecutionProvider"."""
        ...

    @property
    def chunk_tokens(self) -> int:
        """Most tokens that one `run` takes."""
        ...

    @property
    def max_length(self) -> int:
        """Most tokens that the cache holds; it may be fewer than were asked for."""
        ...

    @property
    def length(self) -> int:
        """Tokens in the key-value cache."""
        ...

    def run(self, token_ids: TokenArray, k_cap: TokenArray, rows: LogitRows) -> LogitArray:
        """Append tokens to the cache and compute logits.

        Args:
            token_ids: int64 `[tokens]`, 1 to `chunk_tokens` of them.
            k_cap: int64 `[moe layers]`.
            rows: which positions' logits are wanted on the host.

        Returns:
            float32 `[0 | 1 | tokens, vocabulary]`; the next `run` may overwrite it.

        Raises:
            BackendError: when the engine fails; the cache is then undefined.
        """
        ...

    def experts_used(self) -> TokenArray | None:
        """Return how many experts the tokens of the latest `run` used, summed over them.

        Returns:
            int64 `[moe layers]`; None where the graph has no such output, because every token
            uses as many as the cap allows.
        """
        ...

    def mark(self) -> CacheMark:
        """Return the state of the cache; the latest mark is valid until `reset`."""
        ...

    def rewind(self, mark: CacheMark) -> None:
        """Forget the tokens that were appended after the mark."""
        ...

    def reset(self) -> None:
        """Forget all tokens."""
        ...

    def close(self) -> None:
        """Free the engine; calling it twice is allowed."""
        ...

    def __enter__(self) -> Backend: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...
