"""What is too much for a session that adapts, and how long it waits."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from edgemoe_runtime.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What is too much, and how long to wait.

    Attributes:
        headroom: share of the deadline that a rung must leave, in [0, 0.5).
        in_time: share of tokens to be in time, of those that some rung can, in (0, 1].
        climb_seconds: how long the rung above must have left it; up to four times as long
            when tokens were late soon after the last times.
        pressure_seconds: how long each rung down lasts at least while the machine suffers.
        relief_seconds: how long the machine must be well before a rung comes back.
        trip_margin_celsius: how near a trip point is too near.
        clear_margin_celsius: how far below that is well again.
        power_mw: most power of the board (`Sensors.total_power_mw`), or None.
        memory_bytes: least free memory, or None.

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
