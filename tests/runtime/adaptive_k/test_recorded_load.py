"""The controller on a recording: every token of a session while two processes took its cores.

The recording is of benchmarks/adaptive_k/under_load.py (`--record`), 2026-11-24, 2 x86-64
cores: 8 seconds free, 8 with two busy processes, 8 free; the full k, 15.5 ms a token when free.
"""

from __future__ import annotations

import csv
import itertools
from bisect import bisect_right
from pathlib import Path

import pytest

from edgemoe_runtime.adaptive_k.decision import ControlState, Signals, decide
from edgemoe_runtime.adaptive_k.limits import Limits

TRACE = Path(__file__).parent / "traces" / "two_busy_processes.csv"
COSTS = (1.0, 0.57)
TOKEN_MS = 19.4


@pytest.fixture(scope="module")
def trace() -> list[tuple[float, float]]:
    """When each token ended, in seconds, and what it took, in milliseconds."""
    with TRACE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [(float(row["seconds"]), float(row["milliseconds"])) for row in rows]


def replay(trace: list[tuple[float, float]], *, adapts: bool) -> list[tuple[float, float, int]]:
    """Run tokens through the recording: each takes what the one of that time took, by its rung.

    Returns:
        When each ended, what it would have taken at the full k, and its rung.
    """
    ends = [at for at, _ in trace]
    state, clock, tokens = ControlState(), 0.0, []
    while clock < ends[-1]:
        unit = trace[min(bisect_right(ends, clock), len(trace) - 1)][1]
        rung = state.rung
        clock += unit * COSTS[rung] / 1000
        tokens.append((clock, unit, rung))
        signals = Signals(seconds=clock, token_ms=(unit * COSTS[rung],), each_ms=TOKEN_MS)
        if adapts:
            state, _ = decide(state, signals, COSTS, Limits())
    return tokens


def share_in_time(tokens: list[tuple[float, float, int]]) -> float:
    """Of the tokens that some rung keeps in time, the share that is."""
    possible = [
        unit * COSTS[rung] <= TOKEN_MS
        for _, unit, rung in tokens
        if unit * COSTS[-1] <= TOKEN_MS
    ]
    return sum(possible) / len(possible)


def test_tokens_of_a_loaded_machine_are_in_time_where_a_rung_allows_it(
    trace: list[tuple[float, float]],
) -> None:
    found, alone = replay(trace, adapts=True), replay(trace, adapts=False)
    assert share_in_time(alone) < 0.93
    assert share_in_time(found) >= 0.99
    rungs = [rung for _, _, rung in found]
    moves = sum(a != b for a, b in itertools.pairwise(rungs))
    assert 2 <= moves <= 8
    # The load ends after 16 of 24 seconds.
    assert next(at for at, _, rung in found if at > 16 and rung == 0) < 16 + 8
    assert rungs[-1] == 0
