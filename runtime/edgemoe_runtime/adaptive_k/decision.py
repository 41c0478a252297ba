"""Which rung of the ladder to run on: a decision from what was measured, and nothing else.

A rung is a cap of experts per token, with the time that a token takes on it relative to the
first rung, which is the full k. Three things push down the ladder, their absence back up:

- the speed. The median of the last three tokens' times, each divided by the cost of its
  rung, says how fast the machine is now. When half of the headroom is used up (all of it, where
  the spread is looked at), the best rung that leaves all of it is taken at once. Upwards it
  goes one rung at a time, and only when the rung above has left all of it for a while, by the
  median of more tokens of the last seconds. Where that was too early, the next time takes twice
  as long: a machine at the edge of a rung does not swing.
- the spread, where every single token has a time to keep. A token of the last hundred counts
  against a rung on which it would have been late, if the last rung would have been in time.
  The best rung against which no more of them count than `Limits.in_time` allows is taken. A
  median cannot see a machine that gives its cores away in slices, for every tenth token.
- the machine. A throttle alert, a temperature near the trip point of its own zone, a new
  over-current event, more power than allowed, or little free memory take one rung a second
  away, until all are well clear; then one rung comes back for every few seconds.

`decide` is pure: the same state and signals give the same answer, on any machine.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.pressure import examine
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe_runtime.adaptive_k.limits import Limits
    from edgemoe_runtime.device.sensors import Sensors

_SAMPLES = 3
_STEADY = 25
_STEADY_WAITS = 4.0  # times `Limits.climb_seconds`
_WINDOW = 100
_MOST_PATIENCE = 4.0


@dataclass(frozen=True, kw_only=True)
class Signals:
    """What was measured since the last decision.

    Attributes:
        seconds: a clock that never goes back.
        token_ms: time of each new token since, on the rung in force; may be none.
        allowed_ms: time that a token may take from now on in the mean, or None without a
            deadline.
        each_ms: time that every single token may take, or None.
        sensors: a reading, or None where none was taken.
    """

    seconds: float
    token_ms: Sequence[float] = ()
    allowed_ms: float | None = None
    each_ms: float | None = None
    sensors: Sensors | None = None


@dataclass(frozen=True, kw_only=True)
class ControlState:
    """What the controller remembers.

    Attributes:
        rung: the rung in force; 0 is the full k.
        unit_ms: the last times of a token, each divided by the cost of its rung.
        rungs: the rung that each of them is of.
        measured_at: when each of them was taken in.
        fresh: tokens measured since the last move.
        moved_at: when that was, or None.
        roomy_since: since when the rung above would do, or None.
        climbed_at: when the rung above was last taken, or None if it was left since.
        patience: how many times `Limits.climb_seconds` to wait, in [1, 4].
        pressed: rungs that the machine's state takes away.
        pressed_at: when that number last changed, or when the machine last was not well.
        troubles: what was wrong at the last reading.
        over_current: counters of the last reading.
        impossible: whether no rung is fast enough for the deadline.
    """

    rung: int = 0
    unit_ms: tuple[float, ...] = ()
    rungs: tuple[int, ...] = ()
    measured_at: tuple[float, ...] = ()
    fresh: int = 0
    moved_at: float | None = None
    roomy_since: float | None = None
    climbed_at: float | None = None
    patience: float = 1.0
    pressed: int = 0
    pressed_at: float | None = None
    troubles: tuple[str, ...] = ()
    over_current: Mapping[str, int] = field(default_factory=dict[str, int])
    impossible: bool = False


@dataclass(frozen=True)
class Move:
    """A change of rung, and why."""

    before: int
    after: int
    reason: str

    def __str__(self) -> str:
        return f"rung {self.before} to {self.after}: {self.reason}"


def decide(
    state: ControlState, signals: Signals, costs: Sequence[float], limits: Limits
) -> tuple[ControlState, Move | None]:
    """Choose the rung for the tokens that follow.

    Args:
        state: what was remembered; `ControlState()` at the start.
        signals: what was measured since.
        costs: time of a token on each rung, relative to the first one: falling, in (0, 1].
        limits: what is too much.

    Returns:
        What to remember, and the move, or None where the rung stays.

    Raises:
        RequestError: when the costs do not fall, or the state is of another ladder.
    """
    _check(state, costs)
    state = _measure(state, signals, costs)
    state = _feel(state, signals, limits, len(costs))
    wanted, why = _by_deadline(state, signals, costs, limits)
    state = replace(state, impossible=why == _NO_RUNG)
    if state.pressed > wanted:
        wanted, why = state.pressed, ", ".join(state.troubles) or "the machine has to recover"
    elif wanted > state.rung:
        state = _learn(state, signals.seconds, limits)
    if wanted > state.rung:
        return _move(state, wanted, why or "deadline", signals.seconds)
    if wanted == state.rung:
        return replace(state, roomy_since=None), None
    since = signals.seconds if state.roomy_since is None else state.roomy_since
    waits = signals.seconds - since < state.patience * limits.climb_seconds
    if waits or not _fits_now(state, signals, costs[state.rung - 1], limits):
        return replace(state, roomy_since=since), None
    # Two steps up in a row: the first was not too early.
    patience = state.patience if state.climbed_at is None else 1.0
    state = replace(state, climbed_at=signals.seconds, patience=patience)
    moved, move = _move(state, state.rung - 1, "there is room again", signals.seconds)
    return replace(moved, roomy_since=signals.seconds), move


_NO_RUNG = "no rung is fast enough for the deadline"


def _check(state: ControlState, costs: Sequence[float]) -> None:
    falling = all(a > b for a, b in itertools.pairwise(costs))
    if not costs or not falling or not 0 < costs[-1] <= costs[0] <= 1:
        raise RequestError(f"costs of a ladder must fall, in (0, 1], got {list(costs)}.")
    if not 0 <= state.rung < len(costs):
        raise RequestError(
            f"a controller's rung must be in [0, {len(costs)}), got {state.rung}. Begin with a"
            " new state when the ladder changes."
        )


def _measure(state: ControlState, signals: Signals, costs: Sequence[float]) -> ControlState:
    """Take the new tokens' times in."""
    units = [milliseconds / costs[state.rung] for milliseconds in signals.token_ms]
    return replace(
        state,
        unit_ms=(*state.unit_ms, *units)[-_WINDOW:],
        rungs=(*state.rungs, *[state.rung] * len(units))[-_WINDOW:],
        measured_at=(*state.measured_at, *[signals.seconds] * len(units))[-_WINDOW:],
        fresh=state.fresh + len(units),
    )


def _by_deadline(
    state: ControlState, signals: Signals, costs: Sequence[float], limits: Limits
) -> tuple[int, str]:
    """Return the rung that the deadlines ask for, and why it is not a better one."""
    allowed = _least(signals)
    if allowed is None:
        return 0, ""
    if not state.unit_ms:
        return state.rung, ""
    now = signals.seconds
    if signals.each_ms is None:
        return _by_speed(state, now, allowed, 0.5 * limits.headroom, costs, limits)
    # Single tokens may be as late as they may: how many are is counted.
    by_speed = _by_speed(state, now, allowed, 0.0, costs, limits)
    by_spread = _by_spread(state, signals.each_ms, costs, limits)
    return by_spread if by_spread[0] > by_speed[0] else by_speed


def _least(signals: Signals) -> float | None:
    """Return what a token may take by every deadline, or None without one."""
    given = [each for each in (signals.allowed_ms, signals.each_ms) if each is not None]
    return min(given, default=None)


def _fits_now(state: ControlState, signals: Signals, cost: float, limits: Limits) -> bool:
    """Ask whether the latest tokens, too, would leave all of the headroom at a cost."""
    allowed = _least(signals)
    if allowed is None or not state.unit_ms:
        return True
    return _speed(state.unit_ms[-_SAMPLES:]) * cost <= allowed * (1 - limits.headroom)


def _by_speed(
    state: ControlState,
    now: float,
    allowed_ms: float,
    kept: float,
    costs: Sequence[float],
    limits: Limits,
) -> tuple[int, str]:
    """Return the best rung on which tokens of the latest speed are in time.

    The rung in force is left where tokens leave less than the share ``kept`` of what is
    allowed, and another entered where they leave all of the headroom: it does not swing.
    """
    unit, last = _speed(state.unit_ms[-_SAMPLES:]), len(costs) - 1
    moved = state.moved_at
    waits = moved is not None and now - moved < limits.climb_seconds
    if state.fresh < (min(_SAMPLES, len(state.unit_ms)) if waits else 1):
        # What was measured is mostly of the rung before: it waits.
        return state.rung, _NO_RUNG if unit * costs[last] > allowed_ms else ""
    # What prompts took minutes ago says nothing of now.
    old = sum(at < now - _STEADY_WAITS * limits.climb_seconds for at in state.measured_at)
    recent = state.unit_ms[max(0, min(old, len(state.unit_ms) - _SAMPLES)) :]
    steady = _speed(recent[-_STEADY:])
    why = f"{unit * costs[state.rung]:.1f} ms a token, {allowed_ms:.1f} allowed"
    if unit * costs[state.rung] > allowed_ms * (1 - kept):
        below = range(state.rung + 1, len(costs))
        fast = [n for n in below if unit * costs[n] <= allowed_ms * (1 - limits.headroom)]
        if fast:
            return fast[0], why
        return last, _NO_RUNG if unit * costs[last] > allowed_ms else why
    above = range(state.rung)
    fast = [n for n in above if steady * costs[n] <= allowed_ms * (1 - limits.headroom)]
    return min(fast, default=state.rung), why


def _speed(units: Sequence[float]) -> float:
    """Return how fast the machine is, in ms of a token at full k, by a few of them."""
    # The first of all runs may be a cold one.
    return statistics.median(units) if len(units) >= _SAMPLES else min(units)


def _by_spread(
    state: ControlState, each_ms: float, costs: Sequence[float], limits: Limits
) -> tuple[int, str]:
    """Return the best rung on which few enough of the last tokens would have been late."""
    last = len(costs) - 1
    # What is late on the last rung, too, is no reason to be there.
    possible = [
        sample
        for sample in zip(state.unit_ms, state.rungs, strict=True)
        if sample[0] * costs[last] <= each_ms
    ]
    usual = statistics.median(state.unit_ms)

    def count_late(rung: int) -> int:
        return sum(
            _expect(unit, measured, rung, usual, costs) > each_ms for unit, measured in possible
        )

    why = f"{count_late(state.rung)} of the last {len(state.unit_ms)} tokens late"
    for rung in range(last):
        if count_late(rung) <= (1 - limits.in_time) * _WINDOW + 1e-9:
            return rung, why
    return last, why


def _expect(
    unit_ms: float, measured: int, rung: int, usual_ms: float, costs: Sequence[float]
) -> float:
    """Say how long a token would have taken on another rung than the one it was measured on."""
    scaled = unit_ms * costs[rung]
    if rung >= measured:
        return scaled
    # A hiccup is no longer where tokens are, so what is beyond the usual does not grow.
    beyond = (unit_ms - usual_ms) * costs[measured]
    return min(scaled, usual_ms * costs[rung] + beyond)


def _feel(state: ControlState, signals: Signals, limits: Limits, rungs: int) -> ControlState:
    """Take a reading in: how many rungs the machine's state takes away, and why."""
    reading = signals.sensors
    if reading is None:
        return state
    troubles, is_well = examine(reading, state.over_current, limits)
    counted = dict(reading.over_current_events)
    state = replace(state, troubles=troubles, over_current=counted)
    since = state.pressed_at
    waited = float("inf") if since is None else signals.seconds - since
    if troubles:
        if state.pressed == 0 or waited >= limits.pressure_seconds:
            pressed = min(rungs - 1, state.pressed + 1)
            state = replace(state, pressed=pressed, pressed_at=signals.seconds)
    elif not is_well:
        state = replace(state, pressed_at=signals.seconds)
    elif state.pressed and waited >= limits.relief_seconds:
        # Whoever answers once a minute has read nothing in between.
        back = waited // limits.relief_seconds if limits.relief_seconds else 1
        pressed = max(0, state.pressed - int(min(back, state.pressed)))
        state = replace(state, pressed=pressed, pressed_at=signals.seconds)
    return state


def _learn(state: ControlState, seconds: float, limits: Limits) -> ControlState:
    """Become more patient when the rung above was taken too early, less when it was not."""
    if state.climbed_at is None:
        return state
    too_early = seconds - state.climbed_at < 2 * state.patience * limits.climb_seconds
    patience = state.patience * (2 if too_early else 0.5)
    return replace(state, patience=min(_MOST_PATIENCE, max(1.0, patience)), climbed_at=None)


def _move(
    state: ControlState, rung: int, reason: str, seconds: float
) -> tuple[ControlState, Move]:
    moved = replace(state, rung=rung, fresh=0, moved_at=seconds, roomy_since=None)
    return moved, Move(state.rung, rung, reason)
