"""Calls of a written graph, some of which continue from the caches of others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np


@dataclass(frozen=True)
class Call:
    """New tokens of some rows.

    Attributes:
        ids: Token ids, int64 `[batch, tokens]`.
        after: Index of an earlier call whose cache this one continues; None for no cache.
    """

    ids: np.ndarray[Any, np.dtype[np.int64]]
    after: int | None = None


class Runner(Protocol):
    """A written graph that can be run."""

    @property
    def slice_count(self) -> int:
        """Parts that run one after the other; 1 for the whole graph at once."""
        ...

    def run_calls(
        self,
        calls: Sequence[Call],
        k_cap: Sequence[int],
        take: Callable[[int, np.ndarray[Any, np.dtype[np.float32]]], None],
    ) -> None:
        """Run calls.

        Args:
            calls: The calls; each comes after the one that it continues.
            k_cap: Most experts per token, for each MoE layer.
            take: Called with each call's index and logits, float32
                `[batch, tokens, vocabulary]`, in the order of the calls.

        Raises:
            ExportError: onnxruntime cannot run the graph.
        """
        ...


def count_tokens(calls: Sequence[Call]) -> list[int]:
    """Count the tokens that each call sees, cached ones included.

    Args:
        calls: The calls.

    Returns:
        Their lengths.
    """
    totals: list[int] = []
    for call in calls:
        seen = 0 if call.after is None else totals[call.after]
        totals.append(seen + call.ids.shape[1])
    return totals


def last_uses(calls: Sequence[Call]) -> dict[int, int]:
    """Find the last call that continues from each cache.

    Args:
        calls: The calls.

    Returns:
        By the index of a call that is continued, the index of the last that does.
    """
    return {call.after: number for number, call in enumerate(calls) if call.after is not None}


def cache_shape(dimensions: Sequence[object], batch: int, length: int) -> tuple[int, ...]:
    """Return the shape of one input of a graph's cache.

    Args:
        dimensions: As in the graph: the batch, then sizes; anything but a positive number
            stands for cached positions.
        batch: Rows.
        length: Cached positions.

    Returns:
        The shape.
    """
    sizes = (size if isinstance(size, int) and size > 0 else length for size in dimensions[1:])
    return batch, *sizes
