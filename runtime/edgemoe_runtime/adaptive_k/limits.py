"""Thresholds and waiting times of a session that adapts."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from edgemoe_runtime.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Thresholds and waiting times of a session that adapts.

    Attributes:
        headroom: share of the deadline that a rung must leave free, in [0, 0.5).
        in_time: share of tokens that must be in time, of those that some rung keeps in time,
            in (0, 1].
        climb_seconds: time for which the rung above must have left that headroom before it is
            entered, >= 0; up to four times as long where earlier climbs were too early.
        pressure_seconds: time between two rungs down while a limit is broken, >= 0.
        relief_seconds: time for which the machine must be clear of its limits before a rung
            comes back, >= 0.
        trip_margin_celsius: distance below a trip point that is too near, in °C, >= 0.
        clear_margin_celsius: distance below that which is clear again, in °C, >= 0.
        power_mw: most power of the board in mW (`Sensors.total_power_mw`), or None.
        memory_bytes: least free memory in bytes, or None.

    Raises:
        RequestError: when one is out of range, below 0 or not finite.
    """

    headroom: float = 0.1
    in_time: float = 0.99
    climb_seconds: float = 2.0
    pressure_seconds: float = 1.0
    relief_seconds: float = 5.0
    trip_margin_celsius: float = 3.0
    clear_margin_celsius: float = 5.0
    power_mw: int | None = None
    memory_bytes: int | None = None

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise RequestError(f"{limit.name} must be finite and >= 0, got {value}.")
        if not self.headroom < 0.5:
            raise RequestError(f"headroom must be in [0, 0.5), got {self.headroom}.")
        if not 0 < self.in_time <= 1:
            raise RequestError(f"in_time must be in (0, 1], got {self.in_time}.")
