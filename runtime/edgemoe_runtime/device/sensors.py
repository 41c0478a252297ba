"""Heat, throttling, power, clocks and memory; read only, and nothing needs root.

Which files mean what differs between boards and JetPacks, and any of them may be absent:
a sensor that is not there is left out, and `Sensors.absent` names its kind.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.device.sysfs import matching, parse_integer, read_integer, read_text

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemoe_runtime.json_fields import Json

_MEMINFO = re.compile(r"^(\w+):\s+(\d+) kB$", re.MULTILINE)
_GPU_CLOCKS = ("17000000.gpu", "17000000.ga10b", "gpu-gpc-0")
# Inputs of a whole board: Orin NX, Orin Nano and Xavier NX; Thor; Nano and TX2.
_WHOLE_BOARD = ("VDD_IN", "VIN", "POM_5V_IN")
# A warning that the case is hot to the touch: no clock is lowered for it.
_TOUCH_WARNING = "hot-surface-alert"
_RAILS = 6  # ina3221 has three channels and a sum in 7, which would count them twice


@dataclass(frozen=True)
class ThermalZone:
    """A temperature, and the lowest temperature at which the board slows down, or None."""

    name: str
    celsius: float
    trip_celsius: float | None


@dataclass(frozen=True, kw_only=True)
class Sensors:
    """One reading of the machine.

    Attributes:
        memory_total_bytes: physical memory, or None.
        memory_available_bytes: what can be allocated without swapping; on a Jetson the GPU
            uses the same memory.
        swap_total_bytes: swap, which GPU allocations cannot use.
        zones: temperatures.
        throttling: alerts that are active now, such as "gpu-throttle-alert".
        over_current_events: counters since boot (oc1 under-voltage, oc2 average, oc3
            instantaneous over-current).
        power_mw: power of each supply rail in milliwatts; a rail may be part of another.
        gpu_clock_fraction: GPU clock over its highest, in [0, 1], or None.
        absent: kinds of sensors that this machine does not have or does not show.
    """

    memory_total_bytes: int | None
    memory_available_bytes: int | None
    swap_total_bytes: int | None
    zones: tuple[ThermalZone, ...]
    throttling: tuple[str, ...]
    over_current_events: Mapping[str, int]
    power_mw: Mapping[str, int]
    gpu_clock_fraction: float | None
    absent: tuple[str, ...]

    @property
    def total_power_mw(self) -> int | None:
        """Power of the board in milliwatts, or None where no rail is known.

        That of the rail that feeds all others where there is one, else of all together.
        """
        whole = [self.power_mw[name] for name in _WHOLE_BOARD if name in self.power_mw]
        return max(whole) if whole else sum(self.power_mw.values()) if self.power_mw else None

    def to_dict(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            **asdict(self),
            "zones": [asdict(zone) for zone in self.zones],
            "throttling": list(self.throttling),
            "absent": list(self.absent),
        }


def read_sensors(root: Path) -> Sensors:
    """Read every sensor that is there.

    Args:
        root: where the file system starts; "/" but in tests.
    """
    lines = _MEMINFO.findall(read_text(root / "proc/meminfo") or "")
    kilobytes = {name: parse_integer(value) for name, value in lines}
    meminfo = {name: 1024 * value for name, value in kilobytes.items() if value is not None}
    zones = _read_zones(root)
    alerts = _read_alerts(root)
    events = _read_over_current(root)
    power = _read_power(root)
    clock = _read_gpu_clock(root)
    found: dict[str, object] = {
        "memory": meminfo,
        "temperature": zones,
        "throttle alerts": alerts,
        "over-current counters": events,
        "power": power,
        "GPU clock": clock is not None,
    }
    return Sensors(
        memory_total_bytes=meminfo.get("MemTotal"),
        memory_available_bytes=meminfo.get("MemAvailable"),
        swap_total_bytes=meminfo.get("SwapTotal"),
        zones=zones,
        throttling=tuple(name for name, active in alerts.items() if active),
        over_current_events=events,
        power_mw=power,
        gpu_clock_fraction=clock,
        absent=tuple(name for name, value in found.items() if not value),
    )


def _read_zones(root: Path) -> tuple[ThermalZone, ...]:
    zones: list[ThermalZone] = []
    for folder in matching(root / "sys/class/thermal", "thermal_zone*"):
        millidegrees = read_integer(folder / "temp")
        if millidegrees is None:
            continue  # a zone whose device is asleep refuses to be read
        trips = _read_trips(folder, "passive") or _read_trips(folder, "hot")
        lowest = min(trips) / 1000 if trips else None
        name = read_text(folder / "type") or folder.name
        zones.append(ThermalZone(name, millidegrees / 1000, lowest))
    return tuple(zones)


def _read_trips(zone: Path, kind: str) -> list[int]:
    """Return the trip points of a kind, but those that only warn, in thousandths of °C."""
    coolers: dict[int, set[str | None]] = {}
    for path in matching(zone, "cdev*_trip_point"):
        number = read_integer(path)
        device = read_text(path.with_name(path.name.removesuffix("_trip_point")) / "type")
        if number is not None:
            coolers.setdefault(number, set()).add(device)
    trips: list[int] = []
    for path in matching(zone, "trip_point_*_type"):
        number = parse_integer(path.name.removeprefix("trip_point_").removesuffix("_type"))
        trip = read_integer(path.with_name(path.name.replace("_type", "_temp")))
        warns = number is not None and coolers.get(number) == {_TOUCH_WARNING}
        if trip is not None and trip > 0 and read_text(path) == kind and not warns:
            trips.append(trip)
    return trips


def _read_alerts(root: Path) -> dict[str, bool]:
    alerts: dict[str, bool] = {}
    for folder in matching(root / "sys/class/thermal", "cooling_device*"):
        # fans, cpufreq devices and warnings are cooling devices too, but no sign of throttling
        name = read_text(folder / "type") or ""
        state = read_integer(folder / "cur_state")
        if name.endswith("throttle-alert") and state is not None:
            alerts[name] = state > 0
    return alerts


def _read_over_current(root: Path) -> dict[str, int]:
    events: dict[str, int] = {}
    for path in matching(root / "sys/class/hwmon", "hwmon*/oc*_event_cnt"):
        count = read_integer(path)
        if count is not None:
            events[path.name.split("_", 1)[0]] = count
    return events


def _read_power(root: Path) -> dict[str, int]:
    power: dict[str, int] = {}
    for folder in matching(root / "sys/bus/i2c/devices", "*/hwmon/hwmon*"):
        for channel in range(1, _RAILS + 1):
            label = read_text(folder / f"in{channel}_label")
            millivolts = read_integer(folder / f"in{channel}_input")
            milliamperes = read_integer(folder / f"curr{channel}_input")
            if label in (None, "", "NC") or millivolts is None or milliamperes is None:
                continue
            power[label] = millivolts * milliamperes // 1000
    return power


def _read_gpu_clock(root: Path) -> float | None:
    for name in _GPU_CLOCKS:
        folder = root / "sys/class/devfreq" / name
        current, highest = read_integer(folder / "cur_freq"), read_integer(folder / "max_freq")
        if current is not None and highest:
            return current / highest
    return None
