"""The controller on simulated machines: slow ones, such that stall, such that rest."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe_runtime.adaptive_k.decision import ControlState, Move, Signals, decide
from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.errors import RequestError
from tests.runtime.adaptive_k.simulated_machine import COSTS, NOTHING, simulate


def test_a_slower_clock_is_answered_and_full_k_comes_back() -> None:
    def unit(at: float) -> float:
        return 17.0 if 20 <= at < 60 else 10.0

    run = simulate(unit, 100, 12.0)
    alone = simulate(unit, 100, 12.0, controlled=False)
    assert run.kept(12.0, lambda _: True) > 0.995
    assert alone.kept(12.0, lambda _: True) < 0.8
    # Down once, and up rung by rung: nothing oscillates.
    assert len(run.moves) <= 6
    assert run.state.rung == 0
    back = next(at for at, _, rung in run.tokens if at > 60 and rung == 0)
    assert back < 60 + 10
    # The deadline leaves no more than was needed: 17 ms at 0.55 is 9.4 ms.
    assert {rung for at, _, rung in run.tokens if 22 < at < 59} == {3}


def test_a_single_slow_token_changes_nothing() -> None:
    calls = iter(range(10**6))

    def unit(_: float) -> float:
        return 60.0 if next(calls) % 50 == 25 else 10.0

    run = simulate(unit, 30, 12.0)
    assert run.moves == []


def every(step: int, slow: float, begin: float = 0.0, end: float = 1e6) -> Any:
    """Return the times of a machine that gives its core away in slices, turn by turn."""
    calls = iter(range(10**6))

    def unit(at: float) -> float:
        is_lost = next(calls) % step == step - 1 and begin <= at < end
        return slow if is_lost else 10.0

    return unit


def test_a_machine_that_loses_slices_is_in_time_all_the_same() -> None:
    run = simulate(every(4, 18.0, 20, 60), 100, None, each=12.5)
    late = [ms > 12.5 for at, ms, _ in run.tokens if 20 <= at < 60]
    assert sum(late) / len(late) < 0.01
    # It tries the rung above again and again, and waits longer each time.
    tries = [move for move in run.moves if move.after < move.before]
    assert len(tries) <= 10
    assert run.state.rung == 0
    assert any("tokens late" in move.reason for move in run.moves)
    assert next(at for at, _, rung in run.tokens if at > 60 and rung == 0) < 60 + 16
    # The median alone does not see it: that is how a request's share is judged.
    median = simulate(every(4, 18.0, 20, 60), 100, 12.5)
    late = [ms > 12.5 for at, ms, _ in median.tokens if 20 <= at < 60]
    assert sum(late) / len(late) > 0.01


def test_tokens_that_no_rung_can_save_are_no_reason_to_go_down() -> None:
    assert simulate(every(20, 60.0), 30, None, each=12.5).moves == []
    assert simulate(every(20, 24.0), 30, None, each=12.5).moves


@given(
    st.lists(st.floats(1, 60), min_size=1, max_size=150),
    st.integers(0, len(COSTS) - 1),
    st.floats(5, 40),
    st.sampled_from([0.9, 0.95, 0.99, 1.0]),
)
def test_no_rung_is_kept_that_was_late_too_often(
    units: list[float], rung: int, each: float, share: float
) -> None:
    seen = units[-100:]
    state = ControlState(
        rung=rung,
        full_k_ms=tuple(seen),
        rungs=(rung,) * len(seen),
        tokens_since_move=len(units),
    )
    limits = Limits(in_time=share)
    after, _ = decide(state, Signals(seconds=1.0, each_ms=each), COSTS, limits)
    if after.rung >= rung:
        late = sum(
            each < unit * COSTS[after.rung] and unit * COSTS[-1] <= each for unit in seen
        )
        assert late <= round(100 * (1 - share))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.floats(1, 6), st.floats(5, 40)), min_size=1, max_size=6),
    st.floats(4, 30),
)
def test_whatever_happens_a_rung_that_is_fast_enough_is_found_in_six_tokens(
    parts: list[tuple[float, float]], deadline: float
) -> None:
    ends: list[tuple[float, float]] = []
    for length, unit in parts:
        ends.append((length + (ends[-1][0] if ends else 0.0), unit))

    def unit_of(at: float) -> float:
        return next((unit for end, unit in ends if at < end), ends[-1][1])

    run = simulate(unit_of, ends[-1][0], deadline, noise=0.0)
    since, last = 0, None
    changed: list[int] = []
    for number, (at, ms, rung) in enumerate(run.tokens):
        assert 0 <= rung < len(COSTS)
        unit = unit_of(at)
        since = since + 1 if unit == last else 0
        last = unit
        if since >= 6 and unit * COSTS[-1] <= 0.9 * deadline:
            assert ms <= deadline
        if number and rung != run.tokens[number - 1][2]:
            changed.append(number)
    # Two moves by the deadline have three tokens of the new rung between them.
    assert all(b - a >= 3 for a, b in itertools.pairwise(changed))


def test_a_cold_first_run_costs_no_more_than_itself() -> None:
    costs, limits, state = COSTS, Limits(), ControlState()
    rungs = []
    for number in range(6):
        took = (100.0 if number == 0 else 60.0) * costs[state.rung]
        signals = Signals(seconds=5.0 * number, token_ms=(took,), allowed_ms=80.0)
        state, _ = decide(state, signals, costs, limits)
        rungs.append(state.rung)
    assert rungs[0] > 0
    assert rungs[-1] == 0


def test_prompts_that_come_seldom_get_the_full_k_back_by_time_not_by_number() -> None:
    state, at, rungs = ControlState(), 0.0, []
    for number in range(40):
        slow = number < 25
        took = (30.0 if slow else 10.0) * COSTS[state.rung]
        at += 10.0
        state, _ = decide(
            state, Signals(seconds=at, token_ms=(took,), allowed_ms=16.0), COSTS, Limits()
        )
        rungs.append(state.rung)
    assert set(rungs[5:25]) == {len(COSTS) - 1}
    # Two prompts until the median knows it, then a rung each.
    assert rungs.index(0, 25) <= 25 + 2 + len(COSTS)


def test_who_answers_once_a_minute_does_not_wait_a_minute_for_each_rung() -> None:
    hot = replace(NOTHING, throttling=("gpu-throttle-alert",))
    state = ControlState()
    for second in range(10):
        state, _ = decide(state, Signals(seconds=second, sensors=hot), COSTS, Limits())
    assert state.pressure == len(COSTS) - 1
    state, _ = decide(state, Signals(seconds=70.0, sensors=NOTHING), COSTS, Limits())
    assert state.pressure == 0
    assert state.alerts == ()


def test_the_backoff_ends_when_climbing_was_not_too_early() -> None:
    costs, limits = (1.0, 0.5), Limits()
    state, at = ControlState(backoff=4.0), 0.0
    # Slow for a while, well for long, slow again: nothing was too early.
    for unit, seconds in [(30.0, 20), (10.0, 120)] * 3:
        end = at + seconds
        while at < end:
            took = unit * costs[state.rung]
            at += took / 1000
            signals = Signals(seconds=at, token_ms=(took,), allowed_ms=20.0)
            state, _ = decide(state, signals, costs, limits)
    assert state.backoff == 1.0


def test_a_deadline_that_no_rung_can_keep_is_infeasible() -> None:
    run = simulate(lambda _: 40.0, 5, 10.0)
    assert run.state.infeasible
    assert run.state.rung == len(COSTS) - 1
    assert run.moves[-1].reason == "no rung is fast enough for the deadline"
    assert not simulate(lambda _: 10.0, 5, 12.0).state.infeasible


def test_the_same_signals_give_the_same_answer_and_change_no_state() -> None:
    state = ControlState()
    signals = Signals(seconds=1.0, token_ms=(20.0, 21.0, 19.0), allowed_ms=15.0)
    first = decide(state, signals, COSTS, Limits())
    assert first == decide(state, signals, COSTS, Limits())
    assert state == ControlState()
    assert first[1] == Move(0, 3, "20.0 ms a token, 15.0 allowed")


@pytest.mark.parametrize("costs", [(), (1.0, 1.0), (0.5, 0.7), (1.2, 0.5), (1.0, 0.0)])
def test_ladders_that_do_not_fall_are_refused(costs: tuple[float, ...]) -> None:
    with pytest.raises(RequestError, match="must fall"):
        decide(ControlState(), Signals(seconds=0.0), costs, Limits())


def test_a_state_of_another_ladder_and_a_wild_headroom_are_refused() -> None:
    with pytest.raises(RequestError, match=r"rung must be in \[0, 2\)"):
        decide(ControlState(rung=2), Signals(seconds=0.0), (1.0, 0.5), Limits())
    with pytest.raises(RequestError, match="headroom"):
        Limits(headroom=0.6)
    with pytest.raises(RequestError, match="in_time"):
        Limits(in_time=0)
    for wild in (float("nan"), float("inf"), -1.0):
        for name in ("relief_seconds", "trip_margin_celsius", "power_mw", "headroom"):
            with pytest.raises(RequestError, match=f"{name} must be finite"):
                Limits(**{name: wild})  # type: ignore[arg-type]
