"""The controller on simulated machines: hot ones, such with little memory or power."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.device.sensors import Sensors, ThermalZone
from tests.runtime.adaptive_k.simulated_machine import COSTS, NOTHING, simulate

if TYPE_CHECKING:
    from collections.abc import Callable


def hot_machine(ambient: Callable[[float], float]) -> Any:
    """A body that the work heats and the air cools; its GPU slows down at 90 °C."""
    body = {"celsius": 40.0, "at": 0.0}

    def read(at: float, rung: int) -> Sensors:
        seconds = at - body["at"]
        rest = ambient(at) + 60 * COSTS[rung]
        body["celsius"] += (rest - body["celsius"]) * min(1.0, seconds / 12)
        body["at"] = at
        zone = ThermalZone("gpu-thermal", body["celsius"], 90.0)
        alerts = ("gpu-throttle-alert",) if body["celsius"] >= 90 else ()
        return replace(NOTHING, zones=(zone,), throttling=alerts)

    return read, body


def test_a_jetson_in_the_sun_does_not_throttle_and_recovers_in_the_shade() -> None:
    def ambient(at: float) -> float:
        return 50.0 if 30 <= at < 200 else 20.0

    read, body = hot_machine(ambient)
    hottest = 0.0

    def unit(_: float) -> float:
        nonlocal hottest
        hottest = max(hottest, body["celsius"])
        return 18.0 if body["celsius"] >= 90 else 10.0

    run = simulate(unit, 300, None, sensors=read)
    assert hottest < 90
    assert run.state.rung == 0
    assert any("slows down at 90" in move.reason for move in run.moves)
    # A rung a second at most, down or up.
    assert len(run.moves) < 60
    read, body = hot_machine(ambient)
    hottest = 0.0
    alone = simulate(unit, 300, None, sensors=read, controlled=False)
    assert hottest >= 90
    warm = [ms for at, ms, _ in alone.tokens if 100 < at < 200]
    cared = [ms for at, ms, _ in run.tokens if 100 < at < 200]
    assert sum(cared) / len(cared) < sum(warm) / len(warm)


def test_a_fanless_orin_in_a_warm_cabinet_stays_below_its_trip_point() -> None:
    # Measured on a Jetson Orin Nano with its fan off, and fitted by one body within 0.8 °C:
    # 6.2 °C/W, 6.6 minutes, 99 °C in the end at full power on the bench, 5.7 W without work
    # (FRC team 3847, docs/TECHNICAL.md of https://github.com/Spectrum3847/SpectrumJetson). The
    # cabinet is 12 °C warmer for an hour.
    body = {"celsius": 42.0, "at": 0.0}
    limits = Limits(relief_seconds=30.0)

    def read(at: float, rung: int) -> Sensors:
        ambient = 40.4 + (12.0 if 600 <= at < 4200 else 0.0)
        rest = ambient + 6.2 * (5.7 + 3.75 * COSTS[rung])
        body["celsius"] += (rest - body["celsius"]) * (at - body["at"]) / 396
        body["at"] = at
        zones = tuple(ThermalZone(name, body["celsius"], 99.0) for name in ("cpu", "gpu"))
        return replace(NOTHING, zones=zones, power_mw={"VDD_IN": 9450})

    hottest, states = 0.0, []

    def unit(_: float) -> float:
        nonlocal hottest
        hottest = max(hottest, body["celsius"])
        states.append(body["celsius"])
        return 500.0

    run = simulate(unit, 9000, None, sensors=read, limits=limits)
    assert hottest < 99
    # It takes no more than it must: warm, it works as hard as the trip point allows.
    warm = [
        celsius
        for (at, _, _), celsius in zip(run.tokens, states, strict=True)
        if 3000 < at < 4200
    ]
    assert min(warm) > 82
    assert any("slows down at 99" in move.reason for move in run.moves)
    cool = [rung for at, _, rung in run.tokens if at > 8000]
    assert sum(cool) / len(cool) < 1.5
    body.update(celsius=42.0, at=0.0)
    hottest = 0.0
    simulate(unit, 9000, None, sensors=read, controlled=False)
    assert hottest > 104.5  # where the board shuts down


def test_little_memory_and_too_much_power_push_down_until_they_end() -> None:
    limits = Limits(memory_bytes=500_000_000, power_mw=15_000)

    def squeeze(at: float, _: int) -> Sensors:
        return replace(
            NOTHING,
            memory_available_bytes=200_000_000 if 5 <= at < 20 else 900_000_000,
            power_mw={"VDD_IN": 18_000 if 40 <= at < 50 else 9_000},
        )

    run = simulate(lambda _: 10.0, 90, None, sensors=squeeze, limits=limits)
    rungs = {second: rung for at, _, rung in run.tokens for second in [int(at)]}
    assert rungs[4] == 0
    assert rungs[18] == len(COSTS) - 1
    assert rungs[39] < len(COSTS) - 1
    assert rungs[49] == len(COSTS) - 1
    assert run.state.rung == 0
    reasons = [move.reason for move in run.moves]
    assert any(r == "200 MB of memory free, 500 wanted" for r in reasons)
    assert any(r == "18.0 W, 15.0 allowed" for r in reasons)


def test_new_over_current_events_count_and_old_ones_do_not() -> None:
    def events(at: float, _: int) -> Sensors:
        return replace(NOTHING, over_current_events={"oc3": 7 + int(at >= 10)})

    run = simulate(lambda _: 10.0, 30, None, sensors=events)
    assert [str(move) for move in run.moves] == [
        "rung 0 to 1: over-current event oc3",
        "rung 1 to 0: there is room again",
    ]


def test_a_machine_without_sensors_is_left_alone() -> None:
    run = simulate(lambda _: 10.0, 20, None, sensors=lambda *_: NOTHING)
    assert run.moves == []
