"""A backend in one file: run a bundle's graph with onnx's own reference evaluator.

It is slow and depends on numpy alone, which makes it a second opinion on a graph of primitive
ops (`--target jetson-orin --precision fp32`). Run it on a bundle::

    python docs/extending/examples/reference_backend.py bundle "w1 w2 w3"
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from onnx.reference import ReferenceEvaluator

from edgemoe_runtime import BackendError, Session
from edgemoe_runtime.backends.base import CacheMark
from edgemoe_runtime.backends.registry import BACKENDS
from edgemoe_runtime.errors import BackendUnavailableError

if TYPE_CHECKING:
    from types import TracebackType

    from edgemoe_runtime.backends.base import LogitArray, LogitRows, OpenRequest, TokenArray

NAME = "reference"


class ReferenceBackend:
    """One graph, its cache as numpy arrays that grow with every run."""

    def __init__(self, request: OpenRequest) -> None:
        """Open the task's graph; the bundle has been verified before."""
        manifest = request.manifest
        if (manifest.flavour, manifest.kv_cache.form) != ("tensorrt", "concat"):
            raise BackendUnavailableError(
                "the reference evaluator knows primitive ops only, got flavour "
                f"{manifest.flavour}; export with --target jetson-orin --precision fp32"
            )
        self.name = NAME
        self.chunk_tokens = request.chunk_tokens
        self.max_length = request.max_length
        self._evaluator = ReferenceEvaluator(str(request.graph))
        # Outputs: logits, then the cache in the order of the inputs.
        self._outputs = [spec.name for spec in manifest.outputs]
        # float32 [1, heads, length, size] each, of length 0 at first.
        self._empty = {
            f"past_key_values.{tensor.name}": np.zeros(tensor.shape, tensor.dtype)
            for tensor in manifest.kv_cache.tensors(0)
        }
        self._cache = self._empty
        self.length = 0

    def run(self, token_ids: TokenArray, k_cap: TokenArray, rows: LogitRows) -> LogitArray:
        """Append tokens to the cache and compute logits; see `Backend.run`."""
        total = self.length + len(token_ids)
        inputs: dict[str, Any] = {
            "input_ids": token_ids[None],
            "attention_mask": np.ones((1, total), dtype=np.int64),
            "position_ids": np.arange(self.length, total, dtype=np.int64)[None],
            "k_cap": k_cap,
            **self._cache,
        }
        try:
            found = dict(zip(self._outputs, self._evaluator.run(None, inputs), strict=True))
        except Exception as error:
            raise BackendError(f"{NAME} failed after {self.length} tokens: {error}") from error
        self._cache = {
            name: found["present" + name.removeprefix("past_key_values")]
            for name in self._empty
        }
        self.length = total
        first = {"none": len(token_ids), "last": len(token_ids) - 1, "all": 0}[rows]
        logits: LogitArray = found["logits"][0, first:]
        return logits

    def experts_used(self) -> TokenArray | None:
        """Return None: every token uses as many experts as the cap allows."""
        return None

    def mark(self) -> CacheMark:
        """Return the state of the cache; arrays are never changed in place."""
        return CacheMark(self.length, self._cache)

    def rewind(self, mark: CacheMark) -> None:
        """Forget the tokens that were appended after the mark."""
        self.length, self._cache = mark.length, mark.state  # type: ignore[assignment]

    def reset(self) -> None:
        """Forget all tokens."""
        self.rewind(CacheMark(0, self._empty))

    def close(self) -> None:
        """Free the cache."""
        self._cache = self._empty

    def __enter__(self) -> ReferenceBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


BACKENDS[NAME] = ReferenceBackend


def main(bundle: str, prompt: str) -> None:
    """Continue a prompt, and show which engine did."""
    with Session.open(bundle, backend=NAME, max_length=64) as session:
        answer = session.generate(prompt, max_new_tokens=8)
        print(answer.text, f"[{answer.backend}, {answer.ms_per_token:.0f} ms per token]")


if __name__ == "__main__":
    main(*sys.argv[1:])
