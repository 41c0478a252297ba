"""Measure the cost of a token on each rung of a ladder, on the engine that will run it."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from edgemoe_runtime.bundle.k_ladder import RungCost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.backends.base import Backend
    from edgemoe_runtime.bundle.k_ladder import KRung

_PROMPT_TOKENS = 64
_NEW_TOKENS = 16
_ROUNDS = 7
_OFFSET_ROUNDS = 3
_MOST_OFFSET = 4096.0
# A rung that saves less than this is not worth its loss, and within the noise.
_LEAST_SAVING = 0.02


def measure_costs(
    backend: Backend,
    caps: Sequence[Sequence[int]],
    vocab_size: int,
    *,
    rounds: int = _ROUNDS,
) -> list[RungCost]:
    """Time every rung in turn, several times.

    Other work on the machine slows all rungs down alike, so each round's times are divided by
    the first rung's of that round, and the median of the quotients counts.

    Args:
        backend: the engine; what its cache held is lost.
        caps: caps of experts per token of each rung, one for each MoE layer; the first rung
            is what the others are compared with.
        vocab_size: of the model.
        rounds: how often, after one that is not counted.

    Returns:
        The cost of each rung; 1 for the first.

    Raises:
        BackendError: when the engine fails.
    """
    prompt = _prompt_for(backend, vocab_size)
    arrays = [np.array(cap, np.int64) for cap in caps]
    times = [[_time(backend, prompt, cap) for cap in arrays] for _ in range(rounds + 1)][1:]
    return [
        RungCost(
            prefill=statistics.median(turn[rung][0] / turn[0][0] for turn in times),
            decode=statistics.median(turn[rung][1] / turn[0][1] for turn in times),
        )
        for rung in range(len(arrays))
    ]


def time_rungs(backend: Backend, rungs: Sequence[KRung], vocab_size: int) -> tuple[KRung, ...]:
    """Time the rungs of a ladder, and drop those that are not worth having.

    Args:
        backend: the engine; what its cache held is lost.
        rungs: rungs, the full k first.
        vocab_size: of the model.

    Returns:
        The rungs that `without_dominated` keeps, with their measured costs.

    Raises:
        BackendError: when the engine fails.
    """
    costs = measure_costs(backend, [rung.k_cap for rung in rungs], vocab_size)
    backend.reset()
    return without_dominated(
        [replace(rung, cost=cost) for rung, cost in zip(rungs, costs, strict=True)]
    )


def measure_prompt_offset(backend: Backend, rung: KRung, vocab_size: int) -> float:
    """Measure the fixed time of a prompt, whatever its length; the engine is warm afterwards.

    Args:
        backend: the engine; what its cache held is lost.
        rung: whose cap to run with.
        vocab_size: of the model.

    Returns:
        The fixed time of a prompt over that of one of its tokens, in [0, 4096].

    Raises:
        BackendError: when the engine fails.
    """
    long = _prompt_for(backend, vocab_size)
    short = long[: max(1, len(long) // 8)]
    cap = np.array(rung.k_cap, np.int64)
    turns = [
        [_time(backend, prompt, cap, 0)[0] for prompt in (short, long)]
        for _ in range(_OFFSET_ROUNDS + 1)
    ]
    backend.reset()
    brief, whole = (statistics.median(times) for times in zip(*turns[1:], strict=True))
    per_token = (whole - brief) / max(1, len(long) - len(short))
    if per_token <= 0:
        return _MOST_OFFSET if len(long) > len(short) else 0.0
    return float(min(_MOST_OFFSET, max(0.0, brief / per_token - len(short))))


def without_dominated(rungs: Sequence[KRung]) -> tuple[KRung, ...]:
    """Drop dominated rungs: another one is as fast or faster, and as good or better.

    Args:
        rungs: rungs with a cost, the full k first.

    Returns:
        The first, and those of the others that save time over all that lose less: at least 2%
        of a prompt or of a new token, and never more of either. Where choices are compared, a
        prompt costs its time on the rung, and the share that is escalated to the full k. Of
        rungs without a quality a later one is assumed to lose more.
    """
    others = list(rungs[1:])
    if all(rung.quality is not None for rung in others):
        others.sort(key=lambda rung: rung.quality.drop if rung.quality else 0.0)
    kept, least = [rungs[0]], _time_of(rungs[0])
    for rung in others:
        prompt, token = _time_of(rung)
        prompts, tokens = prompt / least[0], token / least[1]
        if tokens < 1 and prompts <= 1 and min(prompts, tokens) <= 1 - _LEAST_SAVING:
            kept.append(rung)
            least = prompt, token
    return tuple(kept)


def decreasing_costs(costs: Sequence[float]) -> list[float]:
    """Return costs that decrease from rung to rung, where they were measured not to.

    Args:
        costs: time on each rung over that on the first one.

    Returns:
        As many costs, from 1 on: the running minimum, less a millionth for each rung.
    """
    # A rung that is on the ladder for its decode may save nothing on prompts.
    least = 1e-6
    return [
        most * (1 - least * rung)
        for rung, most in enumerate(itertools.accumulate((1.0, *costs[1:]), min))
    ]


def _time_of(rung: KRung) -> tuple[float, float]:
    """Return the time of a prompt and of a new token, over those of the first rung."""
    assert rung.cost is not None
    compares = rung.quality is not None and rung.quality.metric == "accuracy"
    again = rung.quality.asked_again if rung.quality is not None and compares else 0.0
    return rung.cost.prefill + again, rung.cost.decode


def _prompt_for(
    backend: Backend, vocab_size: int
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return tokens from all over the vocabulary."""
    most = min(_PROMPT_TOKENS, backend.chunk_tokens, backend.max_length - _NEW_TOKENS)
    return (7919 * np.arange(max(1, most)) + 3) % vocab_size


def _time(
    backend: Backend,
    prompt: np.ndarray[tuple[int], np.dtype[np.int64]],
    k_cap: np.ndarray[tuple[int], np.dtype[np.int64]],
    new_tokens: int = _NEW_TOKENS,
) -> tuple[float, float]:
    """Return the seconds of a prompt, and of the tokens behind it."""
    backend.reset()
    begin = time.perf_counter()
    backend.run(prompt, k_cap, "last")
    middle = time.perf_counter()
    room = backend.max_length - len(prompt)
    for token in np.resize(prompt, min(new_tokens, room)):
        backend.run(np.array([token], np.int64), k_cap, "last")
    return middle - begin, time.perf_counter() - middle
