"""Devices as recorded trees: files as the boards show them, in a temporary folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from edgemoe_runtime.device.jetson import detect_jetson, jetpack_of
from edgemoe_runtime.device.machine import find_problems, inspect_device
from edgemoe_runtime.device.sensors import read_sensors

ORIN = {
    "etc/nv_tegra_release": "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n",
    "proc/device-tree/compatible": "nvidia,p3737-0000+p3701-0005\0nvidia,tegra234\0",
    "proc/device-tree/model": "NVIDIA Jetson AGX Orin Developer Kit\0",
    "proc/meminfo": "MemTotal:  7789760 kB\nMemFree: 1 kB\nMemAvailable: 512000 kB\n"
    "SwapTotal:  3894880 kB\n",
    "sys/class/thermal/thermal_zone0/type": "cpu-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "51250\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_type": "critical\n",
    "sys/class/thermal/thermal_zone0/trip_point_0_temp": "104500\n",
    "sys/class/thermal/thermal_zone0/trip_point_1_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_1_temp": "99000\n",
    # A warning that the case is hot to the touch, which slows nothing down.
    "sys/class/thermal/thermal_zone0/trip_point_2_type": "passive\n",
    "sys/class/thermal/thermal_zone0/trip_point_2_temp": "70000\n",
    "sys/class/thermal/thermal_zone0/cdev0/type": "cpu-throttle-alert\n",
    "sys/class/thermal/thermal_zone0/cdev0_trip_point": "1\n",
    "sys/class/thermal/thermal_zone0/cdev1/type": "hot-surface-alert\n",
    "sys/class/thermal/thermal_zone0/cdev1_trip_point": "2\n",
    "sys/class/thermal/thermal_zone1/type": "cv0-thermal\n",  # asleep: no temp to be read
    "sys/class/thermal/cooling_device0/type": "pwm-fan\n",
    "sys/class/thermal/cooling_device0/cur_state": "3\n",
    "sys/class/thermal/cooling_device1/type": "gpu-throttle-alert\n",
    "sys/class/thermal/cooling_device1/cur_state": "1\n",
    "sys/class/thermal/cooling_device2/type": "cpu-throttle-alert\n",
    "sys/class/thermal/cooling_device2/cur_state": "0\n",
    "sys/class/thermal/cooling_device3/type": "hot-surface-alert\n",
    "sys/class/thermal/cooling_device3/cur_state": "1\n",
    "sys/class/hwmon/hwmon4/oc1_event_cnt": "0\n",
    "sys/class/hwmon/hwmon4/oc3_event_cnt": "7\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/in1_label": "VDD_GPU_SOC\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/in1_input": "19000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/curr1_input": "400\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/in2_label": "NC\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/in2_input": "19000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/curr2_input": "1\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/in7_label": "sum of shunt voltages\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/in7_input": "19000\n",
    "sys/bus/i2c/devices/1-0040/hwmon/hwmon2/curr7_input": "400\n",
    "sys/class/devfreq/17000000.ga10b/cur_freq": "306000000\n",
    "sys/class/devfreq/17000000.ga10b/max_freq": "1224000000\n",
}


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_an_orin_that_throttles(tmp_path: Path) -> None:
    device = inspect_device(plant(tmp_path, ORIN))
    assert device.jetson is not None
    assert device.jetson.soc is not None
    assert device.jetson.soc.target == "jetson-orin"
    assert (device.jetson.l4t, device.jetson.jetpack) == ("36.4.3", "6.2")
    assert device.compute_capability == 87
    sensors = device.sensors
    assert sensors.memory_available_bytes == 512000 * 1024
    (zone,) = sensors.zones
    assert (zone.name, zone.celsius, zone.trip_celsius) == ("cpu-thermal", 51.25, 99.0)
    assert sensors.throttling == ("gpu-throttle-alert",)
    assert sensors.over_current_events == {"oc1": 0, "oc3": 7}
    assert sensors.power_mw == {"VDD_GPU_SOC": 7600}
    assert sensors.gpu_clock_fraction == 0.25
    assert sensors.absent == ()
    problems = " ".join(map(str, device.findings))
    for word in ("throttles now", "oc3", "500 MiB", "GPU"):
        assert word in problems
    json.dumps(device.to_dict())


@pytest.mark.parametrize("missing", sorted({name.split("/")[1] for name in ORIN}))
def test_every_sensor_may_be_absent(tmp_path: Path, missing: str) -> None:
    files = {name: text for name, text in ORIN.items() if name.split("/")[1] != missing}
    device = inspect_device(plant(tmp_path, files))
    assert device.jetson is not None
    json.dumps(device.to_dict())


def test_garbage_in_sensors_is_no_reading(tmp_path: Path) -> None:
    garbage = {name: "\xff?" for name in ORIN if name.startswith("sys/") or "meminfo" in name}
    sensors = read_sensors(plant(tmp_path, ORIN | garbage))
    assert sensors.zones == ()
    assert sensors.throttling == ()
    assert sensors.memory_total_bytes is None
    assert "memory" in sensors.absent


@pytest.mark.parametrize("digits", [30, 400, 5000])
def test_numbers_that_no_kernel_prints_are_no_reading(tmp_path: Path, digits: int) -> None:
    number = digits * "9"
    words = ("type", "label")
    huge = {
        name: number for name in ORIN if name.startswith("sys/") and not name.endswith(words)
    }
    huge["proc/meminfo"] = f"MemTotal: {number} kB\nMemAvailable: 512000 kB\n"
    sensors = read_sensors(plant(tmp_path, ORIN | huge))
    assert (sensors.zones, sensors.power_mw, sensors.gpu_clock_fraction) == ((), {}, None)
    assert sensors.memory_total_bytes is None
    assert sensors.memory_available_bytes == 512000 * 1024


def test_a_zone_that_only_warns_slows_nothing_down(tmp_path: Path) -> None:
    files = {name: text for name, text in ORIN.items() if "trip_point_1" not in name}
    (zone,) = read_sensors(plant(tmp_path, files)).zones
    assert zone.trip_celsius is None
    hot = {"sys/class/thermal/thermal_zone0/trip_point_0_type": "hot\n"}
    (zone,) = read_sensors(plant(tmp_path, files | hot)).zones
    assert zone.trip_celsius == 104.5


def test_rails_of_a_rail_are_not_counted_twice() -> None:
    sensors = read_sensors(Path("/nothing"))
    assert sensors.total_power_mw is None
    agx = {"VDD_GPU_SOC": 7600, "VDD_CPU_CV": 1200, "VIN_SYS_5V0": 4000}
    assert replace(sensors, power_mw=agx).total_power_mw == 12800
    nano = {"VDD_IN": 9000, "VDD_CPU_GPU_CV": 5000, "VDD_SOC": 2500}
    assert replace(sensors, power_mw=nano).total_power_mw == 9000


def test_a_machine_without_anything(tmp_path: Path) -> None:
    assert detect_jetson(tmp_path) is None
    sensors = read_sensors(tmp_path)
    assert len(sensors.absent) == 6
    problems = find_problems(None, None, {}, (), sensors)
    assert any("onnxruntime is missing" in problem.problem for problem in problems)
    assert all(problem.remedy for problem in problems)


@pytest.mark.parametrize(
    ("l4t", "jetpack"),
    [
        ("36.3", "6.0"),
        ("36.4.0", "6.1"),
        ("36.4.3", "6.2"),
        ("36.4.4", "6.2.1"),
        ("36.4.7", "6.2.1"),
        ("38.2.1", "7.0"),
        ("39.0", "7.2"),
        ("36.40", None),
        ("99.1", None),
        (None, None),
    ],
)
def test_jetpack_of_a_release(l4t: str | None, jetpack: str | None) -> None:
    assert jetpack_of(l4t) == jetpack


def test_this_machine_can_be_inspected() -> None:
    device = inspect_device()
    assert "CPUExecutionProvider" in device.providers
    assert device.packages["numpy"]
