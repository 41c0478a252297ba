"""What this machine has: board, JetPack, GPU, engines, memory, heat. Reads, never changes.

Where Jetson boards keep these facts: `/etc/nv_tegra_release` (L4T release), the device tree,
`/sys/class/thermal` (zones in thousandths of a degree; cooling devices named
`*-throttle-alert` are at state > 0 while the board throttles).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

# L4T release -> JetPack, the longest prefix wins.
_JETPACKS = {
    "35": "5",
    "36.2": "6.0 (developer preview)",
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39": "7.2",
}
_BOARDS = {"tegra234": "jetson-orin", "tegra264": "jetson-thor"}
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
    board = _board(root)
    packages = _packages()
    facts: dict[str, Any] = {
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "device": board or _read(root / "proc/device-tree/model") or "no Jetson",
        "jetpack": _jetpack(root),
        "gpu_compute_capability": _gpu(),
        "python": platform.python_version(),
        "packages": packages,
        "onnxruntime_providers": _providers(),
        "trtexec": _trtexec(root),
        "memory": _memory(root),
        "temperatures_c": _temperatures(root),
        "throttling": _throttling(root),
    }
    facts["missing"] = list(_advice(facts, packages))
    return facts


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode(errors="replace").replace("\0", "").strip()
    except OSError:
        return ""


def _board(root: Path) -> str | None:
    compatible = _read(root / "proc/device-tree/compatible")
    return next((board for chip, board in _BOARDS.items() if chip in compatible), None)


def _jetpack(root: Path) -> str | None:
    match = re.search(r"# R(\d+) .*REVISION: ([\d.]+)", _read(root / "etc/nv_tegra_release"))
    if match is None:
        return None
    release = f"{match[1]}.{match[2]}"
    prefixes = [prefix for prefix in _JETPACKS if f"{release}.".startswith(f"{prefix}.")]
    name = _JETPACKS[max(prefixes, key=len)] if prefixes else "unknown"
    return f"{name} (L4T {release})"


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


def _memory(root: Path) -> dict[str, int]:
    """Return bytes in total and available; on a Jetson the GPU uses the same memory."""
    fields = dict(re.findall(r"(\w+):\s+(\d+) kB", _read(root / "proc/meminfo")))
    wanted = {
        "total_bytes": "MemTotal",
        "available_bytes": "MemAvailable",
        "swap_bytes": "SwapTotal",
    }
    return {name: int(fields[key]) * 1024 for name, key in wanted.items() if key in fields}


def _temperatures(root: Path) -> dict[str, float]:
    temperatures = {}
    for zone in sorted((root / "sys/class/thermal").glob("thermal_zone*")):
        value = _read(zone / "temp")
        if value.lstrip("-").isdigit():
            temperatures[_read(zone / "type") or zone.name] = int(value) / 1000
    return temperatures


def _throttling(root: Path) -> list[str]:
    """Return what throttles now, by the board's own alerts."""
    devices = (root / "sys/class/thermal").glob("cooling_device*")
    alerts = {_read(device / "type"): _read(device / "cur_state") for device in sorted(devices)}
    return [
        name
        for name, state in alerts.items()
        if name.endswith("-alert") and state not in {"", "0"}
    ]


def _advice(facts: dict[str, Any], packages: dict[str, str | None]) -> list[str]:
    advice = []
    providers = facts["onnxruntime_providers"]
    jetson = facts["device"] in _BOARDS.values()
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
