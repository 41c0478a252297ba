"""What `edgemoe doctor` tells: the runtime's view of this machine, and what the kit lacks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.device.machine import PACKAGES, Finding, inspect_device

if TYPE_CHECKING:
    from edgemoe_runtime.device.jetson import Jetson
    from edgemoe_runtime.device.sensors import Sensors


def examine(root: Path = Path("/")) -> dict[str, Any]:
    """Look at this machine.

    Args:
        root: Where the file system starts; another one only in tests.

    Returns:
        JSON values: facts, then `missing`, a list of what could be added and how.
    """
    device = inspect_device(root)
    findings = list(device.findings)
    if "torch" not in device.packages:
        findings.append(
            Finding(
                "no torch, so this machine runs and compiles bundles but makes none",
                "pip install 'edgemoe[export]'",
            )
        )
    sensors = device.sensors
    return {
        "machine": f"{device.machine}, {device.cpu_cores} CPU cores",
        "device": _device(device.jetson),
        "jetpack": _jetpack(device.jetson),
        "gpu_compute_capability": device.compute_capability,
        "python": device.python,
        "packages": {name: device.packages.get(name) for name in PACKAGES},
        "onnxruntime_providers": list(device.providers),
        "trtexec": _trtexec(root),
        "memory": _memory(sensors),
        "temperatures_c": {zone.name: zone.celsius for zone in sensors.zones},
        "power_mw": dict(sensors.power_mw),
        "throttling": list(sensors.throttling),
        "missing": [str(finding) for finding in findings],
    }


def _device(jetson: Jetson | None) -> str:
    if jetson is None:
        return "no Jetson"
    if jetson.soc is not None and jetson.soc.target is not None:
        return jetson.soc.target
    return jetson.model


def _jetpack(jetson: Jetson | None) -> str | None:
    if jetson is None or jetson.l4t is None:
        return None
    return f"{jetson.jetpack or 'unknown'} (L4T {jetson.l4t})"


def _trtexec(root: Path) -> str | None:
    # Debian packages before 10.15 put it outside PATH.
    outside = root / "usr/src/tensorrt/bin/trtexec"
    return shutil.which("trtexec") or (str(outside) if outside.exists() else None)


def _memory(sensors: Sensors) -> dict[str, int]:
    """Return bytes in total and available; on a Jetson the GPU uses the same memory."""
    read = {
        "total_bytes": sensors.memory_total_bytes,
        "available_bytes": sensors.memory_available_bytes,
        "swap_bytes": sensors.swap_total_bytes,
    }
    return {name: size for name, size in read.items() if size is not None}
