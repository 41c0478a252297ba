"""Whether the machine suffers: heat, throttling, over-current, power, memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_runtime.adaptive_k.limits import Limits
    from edgemoe_runtime.device.sensors import Sensors


def examine(
    reading: Sensors, over_current: Mapping[str, int], limits: Limits
) -> tuple[tuple[str, ...], bool]:
    """Say what is wrong with the machine.

    Args:
        reading: what its sensors say.
        over_current: counters of the reading before.
        limits: what is too much.

    Returns:
        What is wrong, in words, and whether all is well clear of that.
    """
    troubles = [f"{alert} is active" for alert in reading.throttling]
    is_well = True
    for zone in reading.zones:
        if zone.trip_celsius is None:
            continue
        near = zone.trip_celsius - limits.trip_margin_celsius
        if zone.celsius >= near:
            slows = f"{zone.trip_celsius:.0f}"
            troubles.append(f"{zone.name} has {zone.celsius:.0f} °C, slows down at {slows}")
        is_well = is_well and zone.celsius <= near - limits.clear_margin_celsius
    for name, count in reading.over_current_events.items():
        if name in over_current and count > over_current[name]:
            troubles.append(f"over-current event {name}")
    power = reading.total_power_mw
    if limits.power_mw is not None and power is not None:
        if power > limits.power_mw:
            troubles.append(f"{power / 1000:.1f} W, {limits.power_mw / 1000:.1f} allowed")
        is_well = is_well and power <= 0.9 * limits.power_mw
    free = reading.memory_available_bytes
    if limits.memory_bytes is not None and free is not None:
        if free < limits.memory_bytes:
            troubles.append(
                f"{free / 1e6:.0f} MB of memory free, {limits.memory_bytes / 1e6:.0f} wanted"
            )
        is_well = is_well and free >= 1.25 * limits.memory_bytes
    return tuple(troubles), is_well and not troubles
