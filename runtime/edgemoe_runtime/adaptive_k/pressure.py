"""Pressure on the machine: heat, throttling, over-current, power, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_runtime.adaptive_k.limits import Limits
    from edgemoe_runtime.device.sensors import Sensors


def find_alerts(
    reading: Sensors, over_current: Mapping[str, int], limits: Limits
) -> tuple[tuple[str, ...], bool]:
    """Compare a reading of the sensors with the limits.

    Args:
        reading: the reading.
        over_current: over-current counters of the reading before.
        limits: the limits.

    Returns:
        The limits that it breaks, in words, and whether it is well clear of all of them.
    """
    alerts = [f"{alert} is active" for alert in reading.throttling]
    is_clear = True
    for zone in reading.zones:
        if zone.trip_celsius is None:
            continue
        near = zone.trip_celsius - limits.trip_margin_celsius
        if zone.celsius >= near:
            slows = f"{zone.trip_celsius:.0f}"
            alerts.append(f"{zone.name} has {zone.celsius:.0f} °C, slows down at {slows}")
        is_clear = is_clear and zone.celsius <= near - limits.clear_margin_celsius
    for name, count in reading.over_current_events.items():
        if name in over_current and count > over_current[name]:
            alerts.append(f"over-current event {name}")
    power = reading.total_power_mw
    if limits.power_mw is not None and power is not None:
        if power > limits.power_mw:
            alerts.append(f"{power / 1000:.1f} W, {limits.power_mw / 1000:.1f} allowed")
        is_clear = is_clear and power <= 0.9 * limits.power_mw
    free = reading.memory_available_bytes
    if limits.memory_bytes is not None and free is not None:
        if free < limits.memory_bytes:
            alerts.append(
                f"{free / 1e6:.0f} MB of memory free, {limits.memory_bytes / 1e6:.0f} wanted"
            )
        is_clear = is_clear and free >= 1.25 * limits.memory_bytes
    return tuple(alerts), is_clear and not alerts
