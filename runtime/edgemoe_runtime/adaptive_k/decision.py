"""The pure decision: which rung of the k ladder to run on, from measurements alone.

`KController` in `k_controller.py` feeds it and carries it out. A rung is a cap of experts per
token, with the time that a token takes on it relative to the first rung, which is the full k.
Three things push down the ladder, their absence back up:

- the median. The median of the last three tokens' times, each divided by the cost of its rung,
  estimates how long a token takes at the full k now. When half of the headroom is used up (all
  of it, where late tokens are counted), the best rung that leaves all of it is taken at once.
  Upwards it goes one rung at a time, and only when the rung above has left all of the headroom
  for a while, by the median of more tokens of the last seconds. Where that was too early, the
  next climb waits twice as long (exponential backoff): a machine at the edge of a rung does not
  oscillate.
- late tokens, where every single token has a time to keep. A token of the last hundred counts
  against a rung on which it would have been late, if the last rung would have been in time.
  The best rung against which no more of them count than `Limits.in_time` allows is taken. A
  median cannot see a machine that preempts the process in slices, for every tenth token.
- pressure. A throttle alert, a temperature near the trip point of its own zone, a new
  over-current event, more power than allowed, or little free memory take one rung a second
  away, until all are well clear; then one rung comes back for every few seconds.

`decide` is pure: the same state and signals give the same answer, on any machine.
"""

from __future__ import annotations

import itertools
import statistics
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgemoe_runtime.adaptive_k.pressure import find_alerts
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe_runtime.adaptive_k.limits import Limits
    from edgemoe_runtime.device.sensors import Sensors

_SAMPLES = 3  # tokens of the median that moves down
_STEADY = 25  # tokens of the median that moves up
_STEADY_WAITS = 4.0  # its age at most, in multiples of `Limits.climb_seconds`
_WINDOW = 100  # tokens that are remembered
_MAX_BACKOFF = 4.0
_NO_RUNG = "no rung is fast enough for the deadline"


@dataclass(frozen=True, kw_only=True)
class Signals:
    """Measurements since the last decision.

    Attributes:
        seconds: a clock that never goes back.
        token_ms: time of each new token since, on the rung in force; may be empty.
        allowed_ms: time that a token may take on average from now on, or None without a
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
    """State that one decision hands to the next.

    Attributes:
        rung: the rung in force; 0 is the full k.
        full_k_ms: latest times of a token, each divided by the cost of its rung.
        rungs: rung on which each of them was measured.
        measured_at: time at which each of them was recorded.
        tokens_since_move: tokens measured since the last move.
        moved_at: time of that move, or None.
        headroom_since: time since which the rung above would do, or None.
        climbed_at: time at which the rung above was last taken, or None if it was left since.
        backoff: multiple of `Limits.climb_seconds` to wait before a climb, in [1, 4].
        pressure: rungs that the machine's state takes away.
        pressure_at: time at which that number last changed, or at which the machine last was
            not clear of its limits.
        alerts: limits that the last reading broke, in words.
        over_current: over-current counters of the last reading.
        infeasible: whether no rung is fast enough for the deadline.
    """

    rung: int = 0
    full_k_ms: tuple[float, ...] = ()
    rungs: tuple[int, ...] = ()
    measured_at: tuple[float, ...] = ()
    tokens_since_move: int = 0
    moved_at: float | None = None
    headroom_since: float | None = None
    climbed_at: float | None = None
    backoff: float = 1.0
    pressure: int = 0
    pressure_at: float | None = None
    alerts: tuple[str, ...] = ()
    over_current: Mapping[str, int] = field(default_factory=dict[str, int])
    infeasible: bool = False


@dataclass(frozen=True)
class Move:
    """A change of rung, and the reason."""

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
        state: state that the last decision returned; `ControlState()` at the start.
        signals: measurements since.
        costs: time of a token on each rung, relative to the first one: decreasing, in (0, 1].
        limits: thresholds and waiting times.

    Returns:
        The state for the next decision, and the move, or None where the rung stays.

    Raises:
        RequestError: when the costs do not decrease, or the state is of another ladder.
    """
    _check(state, costs)
    state = _record_times(state, signals, costs)
    state = _update_pressure(state, signals, limits, len(costs))
    wanted, why = _choose_by_deadline(state, signals, costs, limits)
    state = replace(state, infeasible=why == _NO_RUNG)
    if state.pressure > wanted:
        wanted, why = state.pressure, ", ".join(state.alerts) or "the machine has to recover"
    elif wanted > state.rung:
        state = _update_backoff(state, signals.seconds, limits)
    if wanted > state.rung:
        return _move(state, wanted, why or "deadline", signals.seconds)
    if wanted == state.rung:
        return replace(state, headroom_since=None), None
    since = signals.seconds if state.headroom_since is None else state.headroom_since
    waits = signals.seconds - since < state.backoff * limits.climb_seconds
    if waits or not _has_headroom(state, signals, costs[state.rung - 1], limits):
        return replace(state, headroom_since=since), None
    # Two steps up in a row: the first was not too early.
    backoff = state.backoff if state.climbed_at is None else 1.0
    state = replace(state, climbed_at=signals.seconds, backoff=backoff)
    moved, move = _move(state, state.rung - 1, "there is room again", signals.seconds)
    return replace(moved, headroom_since=signals.seconds), move


def _check(state: ControlState, costs: Sequence[float]) -> None:
    falling = all(a > b for a, b in itertools.pairwise(costs))
    if not costs or not falling or not 0 < costs[-1] <= costs[0] <= 1:
        raise RequestError(f"costs of a ladder must fall, in (0, 1], got {list(costs)}.")
    if not 0 <= state.rung < len(costs):
        raise RequestError(
            f"a controller's rung must be in [0, {len(costs)}), got {state.rung}. Begin with a"
            " new state when the ladder changes."
        )


def _record_times(
    state: ControlState, signals: Signals, costs: Sequence[float]
) -> ControlState:
    """Record the times of the new tokens."""
    new = [milliseconds / costs[state.rung] for milliseconds in signals.token_ms]
    return replace(
        state,
        full_k_ms=(*state.full_k_ms, *new)[-_WINDOW:],
        rungs=(*state.rungs, *[state.rung] * len(new))[-_WINDOW:],
        measured_at=(*state.measured_at, *[signals.seconds] * len(new))[-_WINDOW:],
        tokens_since_move=state.tokens_since_move + len(new),
    )


def _choose_by_deadline(
    state: ControlState, signals: Signals, costs: Sequence[float], limits: Limits
) -> tuple[int, str]:
    """Return the rung that the deadlines require, and why it is not a better one."""
    allowed = _tightest_ms(signals)
    if allowed is None:
        return 0, ""
    if not state.full_k_ms:
        return state.rung, ""
    now = signals.seconds
    if signals.each_ms is None:
        return _choose_by_median(state, now, allowed, 0.5 * limits.headroom, costs, limits)
    # The median may use all of the headroom here: late tokens are counted one by one.
    by_median = _choose_by_median(state, now, allowed, 0.0, costs, limits)
    by_late_tokens = _choose_by_late_tokens(state, signals.each_ms, costs, limits)
    return by_late_tokens if by_late_tokens[0] > by_median[0] else by_median


def _tightest_ms(signals: Signals) -> float | None:
    """Return the time that a token may take by every deadline, or None without one."""
    given = [each for each in (signals.allowed_ms, signals.each_ms) if each is not None]
    return min(given, default=None)


def _has_headroom(state: ControlState, signals: Signals, cost: float, limits: Limits) -> bool:
    """Return whether the latest tokens, too, would leave all of the headroom at a cost."""
    allowed = _tightest_ms(signals)
    if allowed is None or not state.full_k_ms:
        return True
    return _typical_ms(state.full_k_ms[-_SAMPLES:]) * cost <= allowed * (1 - limits.headroom)


def _choose_by_median(
    state: ControlState,
    now: float,
    allowed_ms: float,
    kept: float,
    costs: Sequence[float],
    limits: Limits,
) -> tuple[int, str]:
    """Return the best rung on which tokens of the latest median time are in time.

    The rung in force is left where tokens leave less than the share `kept` of the allowed
    time, and another entered where they leave all of the headroom: this hysteresis keeps it
    from oscillating.
    """
    full_k_ms, last = _typical_ms(state.full_k_ms[-_SAMPLES:]), len(costs) - 1
    moved = state.moved_at
    waits = moved is not None and now - moved < limits.climb_seconds
    if state.tokens_since_move < (min(_SAMPLES, len(state.full_k_ms)) if waits else 1):
        # Most measurements are still of the rung before.
        return state.rung, _NO_RUNG if full_k_ms * costs[last] > allowed_ms else ""
    # Prompt times of minutes ago do not describe the machine now.
    old = sum(at < now - _STEADY_WAITS * limits.climb_seconds for at in state.measured_at)
    recent = state.full_k_ms[max(0, min(old, len(state.full_k_ms) - _SAMPLES)) :]
    steady = _typical_ms(recent[-_STEADY:])
    why = f"{full_k_ms * costs[state.rung]:.1f} ms a token, {allowed_ms:.1f} allowed"
    if full_k_ms * costs[state.rung] > allowed_ms * (1 - kept):
        below = range(state.rung + 1, len(costs))
        fast = [n for n in below if full_k_ms * costs[n] <= allowed_ms * (1 - limits.headroom)]
        if fast:
            return fast[0], why
        return last, _NO_RUNG if full_k_ms * costs[last] > allowed_ms else why
    above = range(state.rung)
    fast = [n for n in above if steady * costs[n] <= allowed_ms * (1 - limits.headroom)]
    return min(fast, default=state.rung), why


def _typical_ms(times: Sequence[float]) -> float:
    """Return the typical time of a token at the full k in ms, from a few of them."""
    # The very first run may be a cold one.
    return statistics.median(times) if len(times) >= _SAMPLES else min(times)


def _choose_by_late_tokens(
    state: ControlState, each_ms: float, costs: Sequence[float], limits: Limits
) -> tuple[int, str]:
    """Return the best rung on which few enough of the latest tokens would have been late."""
    last = len(costs) - 1
    # A token that is late on the last rung, too, is no reason to be there.
    possible = [
        sample
        for sample in zip(state.full_k_ms, state.rungs, strict=True)
        if sample[0] * costs[last] <= each_ms
    ]
    usual = statistics.median(state.full_k_ms)

    def count_late(rung: int) -> int:
        return sum(
            _predict_ms(full_k_ms, measured, rung, usual, costs) > each_ms
            for full_k_ms, measured in possible
        )

    why = f"{count_late(state.rung)} of the last {len(state.full_k_ms)} tokens late"
    for rung in range(last):
        if count_late(rung) <= (1 - limits.in_time) * _WINDOW + 1e-9:
            return rung, why
    return last, why


def _predict_ms(
    full_k_ms: float, measured: int, rung: int, usual_ms: float, costs: Sequence[float]
) -> float:
    """Predict the time of a token on another rung than the one it was measured on."""
    scaled = full_k_ms * costs[rung]
    if rung >= measured:
        return scaled
    # A hiccup lasts as long on any rung, so the part beyond the usual time does not scale.
    beyond = (full_k_ms - usual_ms) * costs[measured]
    return min(scaled, usual_ms * costs[rung] + beyond)


def _update_pressure(
    state: ControlState, signals: Signals, limits: Limits, rungs: int
) -> ControlState:
    """Update how many rungs the machine's state takes away, and why, from a reading."""
    reading = signals.sensors
    if reading is None:
        return state
    alerts, is_clear = find_alerts(reading, state.over_current, limits)
    counted = dict(reading.over_current_events)
    state = replace(state, alerts=alerts, over_current=counted)
    since = state.pressure_at
    waited = float("inf") if since is None else signals.seconds - since
    if alerts:
        if state.pressure == 0 or waited >= limits.pressure_seconds:
            pressure = min(rungs - 1, state.pressure + 1)
            state = replace(state, pressure=pressure, pressure_at=signals.seconds)
    elif not is_clear:
        state = replace(state, pressure_at=signals.seconds)
    elif state.pressure and waited >= limits.relief_seconds:
        # A session that answers once a minute has read nothing in between.
        back = waited // limits.relief_seconds if limits.relief_seconds else 1
        pressure = max(0, state.pressure - int(min(back, state.pressure)))
        state = replace(state, pressure=pressure, pressure_at=signals.seconds)
    return state


def _update_backoff(state: ControlState, seconds: float, limits: Limits) -> ControlState:
    """Double the backoff when the rung above was taken too early, halve it when it was not."""
    if state.climbed_at is None:
        return state
    too_early = seconds - state.climbed_at < 2 * state.backoff * limits.climb_seconds
    backoff = state.backoff * (2 if too_early else 0.5)
    return replace(state, backoff=min(_MAX_BACKOFF, max(1.0, backoff)), climbed_at=None)


def _move(
    state: ControlState, rung: int, reason: str, seconds: float
) -> tuple[ControlState, Move]:
    moved = replace(
        state, rung=rung, tokens_since_move=0, moved_at=seconds, headroom_since=None
    )
    return moved, Move(state.rung, rung, reason)
