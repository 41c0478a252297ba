"""What this machine has: board, JetPack, GPU, engines, memory, heat. Reads, never changes.

Board and sensors are read by the runtime, which needs them on the device as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.jetson import detect_jetson
from edgemoe_runtime.sensors import read_sensors
from edgemoe_runtime.sysfs import read_text

if TYPE_CHECKING:
    from edgemoe_runtime.jetson import Jetson
    from edgemoe_runtime.sensors import Sensors

# distribution -> module; the two onnxruntime distributions share a module.
_PACKAGES = {
    "onnxruntime": "onnxruntime",
    "onnxruntime-gpu": "onnxruntime",
    "tensorrt": "tensorrt",
    "tensorrt-rtx": "tensorrt_rtx",
    "torch": "torch",
    "transformers": "transformers",
}


def examine(root: Path = Path("/")) -> dict[str, Any]:
    """Look at this machine.

    Args:
        root: Where the file system starts; another one only in tests.

    Returns:
        JSON values: facts, then ``missing``, a list of what could be added and how.
    """
    jetson = detect_jetson(root)
    sensors = read_sensors(root)
    packages = _packages()
    facts: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "device": _device(root, jetson),
        "jetpack": _jetpack(jetson),
        "gpu_compute_capability": _gpu(),
        "python": platform.python_version(),
        "packages": packages,
        "onnxruntime_providers": _providers(),
        "trtexec": _trtexec(root),
        "memory": _memory(sensors),
        "temperatures_c": {zone.name: zone.celsius for zone in sensors.zones},
        "throttling": list(sensors.throttling),
    }
    facts["missing"] = list(_advice(facts, packages))
    return facts


def _device(root: Path, jetson: Jetson | None) -> str:
    if jetson is not None and jetson.soc is not None and jetson.soc.target is not None:
        return jetson.soc.target
    return read_text(root / "proc/device-tree/model") or "no Jetson"


def _jetpack(jetson: Jetson | None) -> str | None:
    if jetson is None or jetson.l4t is None:
        return None
    return f"{jetson.jetpack or 'unknown'} (L4T {jetson.l4t})"


def _gpu() -> int | None:
    from edgemoe_exporters.tensorrt.targets import Machine

    return Machine.detect().compute_capability


def _packages() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for distribution, module in _PACKAGES.items():
        try:
            versions[distribution] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[distribution] = None
        # JetPack's own Python bindings may come without a distribution's metadata.
        if versions[distribution] is None and distribution == "tensorrt":
            found = importlib.util.find_spec(module) is not None
            versions[distribution] = "present" if found else None
    return versions


def _providers() -> list[str]:
    if importlib.util.find_spec("onnxruntime") is None:
        return []
    import onnxruntime

    return [str(name) for name in onnxruntime.get_available_providers()]


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


def _advice(facts: dict[str, Any], packages: dict[str, str | None]) -> list[str]:
    advice = []
    providers = facts["onnxruntime_providers"]
    jetson = str(facts["device"]).startswith("jetson-")
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        advice.append(
            "onnxruntime and onnxruntime-gpu overwrite each other: pip uninstall both, then "
            "install one of edgemoe[ort] and edgemoe[ort-gpu]"
        )
    if not providers:
        advice.append("no onnxruntime, so no fallback engine: pip install 'edgemoe[ort]'")
    if jetson and "CUDAExecutionProvider" not in providers:
        advice.append(
            "onnxruntime cannot use the GPU here: PyPI has no aarch64 onnxruntime-gpu; install "
            "the wheel that NVIDIA builds for your JetPack"
        )
    if (
        not jetson
        and facts["gpu_compute_capability"]
        and "CUDAExecutionProvider" not in providers
    ):
        advice.append("onnxruntime cannot use the GPU: pip install 'edgemoe[ort-gpu]'")
    if jetson and packages["tensorrt"] is None:
        advice.append(
            "TensorRT's Python bindings are missing: apt-get install python3-libnvinfer, and "
            "make the virtual environment with --system-site-packages"
        )
    if packages["torch"] is None:
        advice.append(
            "no torch: this machine runs and compiles bundles; to make them: "
            "pip install 'edgemoe[export]'"
        )
    if facts["throttling"]:
        advice.append("the board throttles now: let it cool, or choose a lower power mode")
    return advice
