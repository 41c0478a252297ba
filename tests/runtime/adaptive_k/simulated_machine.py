"""A machine that makes tokens one after the other, and the controller that watches it."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.decision import ControlState, Move, Signals, decide
from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.device.sensors import Sensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

COSTS = (1.0, 0.85, 0.7, 0.55, 0.4)
NOTHING = Sensors(
    memory_total_bytes=None,
    memory_available_bytes=None,
    swap_total_bytes=None,
    zones=(),
    throttling=(),
    over_current_events={},
    power_mw={},
    gpu_clock_fraction=None,
    absent=("memory", "temperature"),
)


@dataclass
class Run:
    """Tokens, moves and last state of a simulation."""

    tokens: list[tuple[float, float, int]] = field(default_factory=list)
    moves: list[Move] = field(default_factory=list)
    state: ControlState = field(default_factory=ControlState)

    def kept(self, deadline: float, possible: Callable[[float], bool]) -> float:
        """Share of tokens in time, of those for which some rung is fast enough."""
        in_time = [ms <= deadline for at, ms, _ in self.tokens if possible(at)]
        return sum(in_time) / len(in_time)


def simulate(
    unit_of: Callable[[float], float],
    seconds: float,
    deadline: float | None,
    *,
    sensors: Callable[[float, int], Sensors] | None = None,
    limits: Limits | None = None,
    each: float | None = None,
    noise: float = 0.03,
    controlled: bool = True,
    costs: Sequence[float] = COSTS,
) -> Run:
    """Make tokens one after the other; `unit_of` is the time of one at the full k, in ms."""
    draw = random.Random(0)
    run, clock = Run(), 0.0
    while clock < seconds:
        rung = run.state.rung
        took = unit_of(clock) * costs[rung] * draw.gauss(1, noise)
        run.tokens.append((clock, took, rung))
        clock += took / 1000
        reading = None if sensors is None else sensors(clock, rung)
        signals = Signals(
            seconds=clock,
            token_ms=(took,),
            allowed_ms=deadline,
            each_ms=each,
            sensors=reading,
        )
        if controlled:
            run.state, move = decide(run.state, signals, costs, limits or Limits())
            run.moves += [] if move is None else [move]
    return run
