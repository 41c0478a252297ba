"""Time a written graph beside an unpruned one, in turn, for a few seconds.

What else the machine does slows both alike where they take turns, so the medians of short
repeats compare well although each of them may be off.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import GenerationConfig

from edgemoe.models.loading import quiet_transformers

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.validation.graph_runner import GraphRunner

_PROMPT_TOKENS = 32
_NEW_TOKENS = 8
LEAST_LENGTH = _PROMPT_TOKENS + _NEW_TOKENS
"""Fewest tokens that a model must read at once to be timed."""

_LEAST_REPEATS, _MOST_REPEATS = 3, 15
_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Milliseconds for each new token of a short answer, its prompt included.

    Attributes:
        ms_per_token: Of the bundle's graph, in milliseconds.
        unpruned_ms_per_token: Of a graph with all experts in the same precision; None where
            nothing was pruned.
        checkpoint_ms_per_token: Of the checkpoint, by transformers in float32; None where that
            is not in memory.
        repeats: Repeats behind each median.
    """

    ms_per_token: float
    unpruned_ms_per_token: float | None
    checkpoint_ms_per_token: float | None
    repeats: int

    @property
    def times_unpruned(self) -> float | None:
        """How many times as fast as the unpruned graph."""
        other = self.unpruned_ms_per_token
        return None if other is None else other / self.ms_per_token

    @property
    def times_checkpoint(self) -> float | None:
        """How many times as fast as the checkpoint."""
        other = self.checkpoint_ms_per_token
        return None if other is None else other / self.ms_per_token

    def to_json(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            **vars(self),
            "times_unpruned": self.times_unpruned,
            "times_checkpoint": self.times_checkpoint,
            "prompt_tokens": _PROMPT_TOKENS,
            "new_tokens": _NEW_TOKENS,
        }


def measure_speed(
    graph: Callable[[], None],
    unpruned: Callable[[], None] | None,
    checkpoint: Callable[[], None] | None,
    seconds: float = _SECONDS,
) -> Speed:
    """Time short answers of both graphs in turn, and of the checkpoint after them.

    Args:
        graph: Answers with the bundle's graph.
        unpruned: Answers with the unpruned graph, if there is one.
        checkpoint: Answers with the checkpoint, if it is in memory.
        seconds: When to stop, between 3 and 15 repeats of each.

    Returns:
        The medians.
    """
    answers = {"graph": graph} if unpruned is None else {"graph": graph, "unpruned": unpruned}
    times = _time_in_turn(answers, seconds)
    if checkpoint is not None:
        # By itself: whoever came after it would find the processor's caches full of it.
        times.update(_time_in_turn({"checkpoint": checkpoint}, seconds / 2))
    medians = {
        name: 1000 * statistics.median(taken) / _NEW_TOKENS for name, taken in times.items()
    }
    return Speed(
        ms_per_token=medians["graph"],
        unpruned_ms_per_token=medians.get("unpruned"),
        checkpoint_ms_per_token=medians.get("checkpoint"),
        repeats=len(times["graph"]),
    )


def answering_graph(
    runner: GraphRunner, ids: Sequence[int], k_cap: Sequence[int]
) -> Callable[[], None]:
    """Return what makes a graph read a prompt and say a few tokens.

    Args:
        runner: The graph.
        ids: Tokens of some text, at least one.
        k_cap: Full k of each MoE layer.

    Returns:
        A function to time.
    """
    prompt = np.resize(np.array(ids, np.int64), (1, _PROMPT_TOKENS))

    def answer() -> None:
        runner.start(1, k_cap)
        logits = runner.run(prompt)
        for _ in range(_NEW_TOKENS - 1):
            logits = runner.run(logits[:, -1:].argmax(-1).astype(np.int64))

    return answer


def answering_checkpoint(model: MoeModel, ids: Sequence[int]) -> Callable[[], None] | None:
    """Return what makes a checkpoint read a prompt and say a few tokens.

    Args:
        model: The checkpoint, in memory.
        ids: Tokens of some text, at least one.

    Returns:
        A function to time; None for a family that transformers cannot generate with.
    """
    prompt = torch.from_numpy(np.resize(np.array(ids, np.int64), (1, _PROMPT_TOKENS)))
    settings = GenerationConfig(
        max_new_tokens=_NEW_TOKENS,
        min_new_tokens=_NEW_TOKENS,
        do_sample=False,
        pad_token_id=0,
    )

    def answer() -> None:
        generator: Any = model.model
        with torch.inference_mode(), quiet_transformers():
            generator.generate(
                prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )

    try:
        answer()
    except Exception:  # a family's own code may raise anything, and no export fails for a time
        return None
    return answer


def _time_in_turn(
    answers: Mapping[str, Callable[[], None]], seconds: float
) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in answers}
    for answer in answers.values():
        answer()  # the first call allocates
    end = time.perf_counter() + seconds
    for repeat in range(_MOST_REPEATS):
        if repeat >= _LEAST_REPEATS and time.perf_counter() > end:
            break
        for name, answer in answers.items():
            begin = time.perf_counter()
            answer()
            times[name].append(time.perf_counter() - begin)
    return times
