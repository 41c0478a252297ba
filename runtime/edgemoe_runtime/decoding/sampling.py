"""Choose the next token: pure functions of the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgemoe_runtime.arguments import check_count, check_number
from edgemoe_runtime.errors import BackendError, RequestError

if TYPE_CHECKING:
    from edgemoe_runtime.backends.base import LogitArray

FloatArray = NDArray[np.float64]


class NotFiniteError(BackendError):
    """The engine returned logits that are NaN or infinite."""

    def __init__(self, got: object, precision: str | None = None) -> None:
        """Say what is likely to be wrong.

        Args:
            got: a logit.
            precision: `fp16` where activations are in float16, else None.
        """
        self.got = got
        likely = (
            "the graph or the engine is broken. Verify the bundle, or open the session with"
            " another backend."
        )
        if precision == "fp16":
            likely = (
                "an activation of this float16 graph has overflowed, which ends at 65504. The"
                " bundle is whole: some texts need a wider range. Export the model again with"
                " --precision fp32, or int8 or int4 for the target cpu, whose activations are"
                " in float32."
            )
        super().__init__(f"Logits must be finite, got {got}: {likely}")


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings of the choice of the next token.

    Attributes:
        temperature: 0 for the most likely token; else logits are divided by it.
        top_k: keep the k most likely tokens, or None.
        top_p: keep the smallest set of most likely tokens whose cumulative probability reaches
            it, in (0, 1].
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        rule = "a finite number >= 0"
        if check_number("temperature", self.temperature, rule) < 0.0:
            raise RequestError(
                f"temperature must be {rule}, got {self.temperature}. Use 0 for the most likely"
                " token."
            )
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1)
        if not 0.0 < check_number("top_p", self.top_p, "in (0, 1]") <= 1.0:
            raise RequestError(f"top_p must be in (0, 1], got {self.top_p}.")


def choose_token(logits: LogitArray, sampling: Sampling, generator: np.random.Generator) -> int:
    """Choose a token.

    Args:
        logits: float32 `[vocabulary]`.
        sampling: settings of the choice.
        generator: source of randomness; not used at temperature 0.

    Raises:
        BackendError: when the engine returned logits that are not finite.
    """
    best = int(np.argmax(logits))
    if not math.isfinite(float(logits[best])):
        raise NotFiniteError(logits[best])
    if sampling.temperature == 0.0:
        return best
    tokens, probabilities = keep_likely(logits, sampling)
    point = generator.random() * probabilities.sum()
    index = int(np.count_nonzero(np.cumsum(probabilities) <= point))
    return int(tokens[min(index, len(tokens) - 1)])


def keep_likely(logits: LogitArray, sampling: Sampling) -> tuple[NDArray[np.int64], FloatArray]:
    """Return the tokens that may be sampled and their probabilities, most likely first.

    Temperature first, then top-k, then top-p of what top-k left; ties go to the lower id.

    Args:
        logits: float32 `[vocabulary]`, finite.
        sampling: settings of the choice; temperature above 0.

    Returns:
        int64 `[kept]` token ids and float64 `[kept]` probabilities that add up to 1.
    """
    scaled = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    weights = np.exp(scaled)
    tokens = np.arange(len(weights), dtype=np.int64)
    if sampling.top_k is not None and sampling.top_k < len(weights):
        cut = np.partition(weights, -sampling.top_k)[-sampling.top_k]
        tokens = tokens[weights >= cut]
    elif sampling.top_p < 1.0:
        # a tail of n tokens each below (1 - p) / n cannot reach into the nucleus, so the
        # sort, which would cost more than the rest of a step, sees only the others
        floor = (1.0 - sampling.top_p) * weights.sum() / len(weights)
        tokens = tokens[weights >= floor]
    tokens = tokens[np.argsort(-weights[tokens], kind="stable")]
    if sampling.top_k is not None:
        tokens = tokens[: sampling.top_k]
    kept = weights[tokens]
    if sampling.top_p < 1.0:
        total = kept.sum() if sampling.top_k is not None else weights.sum()
        cumulative = np.cumsum(kept) / total
        count = int(np.searchsorted(cumulative, sampling.top_p, side="left")) + 1
        tokens, kept = tokens[:count], kept[:count]
    return tokens, kept / kept.sum()


def log_probabilities(logits: LogitArray, tokens: NDArray[np.int64]) -> FloatArray:
    """Return the log-likelihood of one token per row.

    Args:
        logits: float32 `[rows, vocabulary]`.
        tokens: int64 `[rows]`.

    Returns:
        float64 `[rows]`.

    Raises:
        BackendError: when the engine returned logits that are not finite.
    """
    highest = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(highest).all():
        raise NotFiniteError(highest[~np.isfinite(highest)][0])
    normaliser: FloatArray = np.log(np.exp(logits - highest).sum(axis=-1, dtype=np.float64))
    chosen = logits[np.arange(len(tokens)), tokens].astype(np.float64)
    likely: FloatArray = chosen - highest[:, 0].astype(np.float64) - normaliser
    return likely
