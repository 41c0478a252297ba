"""Inspect this machine: hardware, packages, and what is missing to run bundles on it."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.device.gpu import compute_capability
from edgemoe_runtime.device.jetson import Jetson, detect_jetson
from edgemoe_runtime.device.sensors import Sensors, read_sensors
from edgemoe_runtime.execution_providers import (
    CPU,
    CUDA,
    MINIMUM_VERSION,
    release_numbers,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_runtime.json_fields import Json

# distributions whose presence decides what can run here; asked by metadata, not imported
PACKAGES = (
    "edgemoe",
    "numpy",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx",
    "torch",
    "transformers",
)
_LOW_MEMORY_BYTES = 1 << 30  # 1 GiB: less is not enough for a small model and its cache


@dataclass(frozen=True)
class Finding:
    """Something that is wrong or missing, and how to mend it."""

    problem: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.problem}: {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Device:
    """Description of this machine.

    Attributes:
        machine: processor architecture, such as "aarch64".
        cpu_cores: cores that this process may use.
        python: version of the interpreter.
        jetson: which Jetson it is, or None.
        compute_capability: of the GPU, major * 10 + minor, or None without a GPU.
        packages: versions of the installed packages that matter here.
        providers: onnxruntime's execution providers; empty without onnxruntime.
        sensors: one reading.
        findings: what is missing, with remedies.
    """

    machine: str
    cpu_cores: int
    python: str
    jetson: Jetson | None
    compute_capability: int | None
    packages: Mapping[str, str]
    providers: tuple[str, ...]
    sensors: Sensors
    findings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Json]:
        """Convert to JSON.

        Returns:
            One key for each attribute.
        """
        return {
            "machine": self.machine,
            "cpu_cores": self.cpu_cores,
            "python": self.python,
            "jetson": None if self.jetson is None else asdict(self.jetson),
            "compute_capability": self.compute_capability,
            "packages": dict(self.packages),
            "providers": list(self.providers),
            "sensors": self.sensors.to_dict(),
            "findings": [asdict(finding) for finding in self.findings],
        }


def inspect_device(root: str | os.PathLike[str] = "/") -> Device:
    """Inspect this machine; nothing is changed and nothing needs root.

    Args:
        root: root of the file system. Another one than "/" is a recorded tree: then the GPU
            is identified by the tree alone.

    Returns:
        Hardware, packages, one reading of the sensors, and what is missing.
    """
    tree = Path(root)
    jetson = detect_jetson(tree)
    packages = _installed_packages()
    providers = _execution_providers()
    sensors = read_sensors(tree)
    capability = _compute_capability(jetson, live=tree == Path("/"))
    return Device(
        machine=platform.machine(),
        cpu_cores=_usable_cores(),
        python=platform.python_version(),
        jetson=jetson,
        compute_capability=capability,
        packages=packages,
        providers=providers,
        sensors=sensors,
        findings=tuple(find_problems(jetson, capability, packages, providers, sensors)),
    )


def find_problems(
    jetson: Jetson | None,
    compute_capability: int | None,
    packages: Mapping[str, str],
    providers: tuple[str, ...],
    sensors: Sensors,
) -> list[Finding]:
    """Return what is wrong or missing, the gravest first.

    Args:
        jetson: which Jetson it is, or None.
        compute_capability: of the GPU, or None.
        packages: versions of installed packages.
        providers: onnxruntime's execution providers.
        sensors: one reading.
    """
    findings: list[Finding] = []

    def add(holds: object, problem: str, remedy: str) -> None:
        if holds:
            findings.append(Finding(problem, remedy))

    version = packages.get("onnxruntime-gpu") or packages.get("onnxruntime")
    add(
        CPU not in providers,
        "onnxruntime is missing or damaged, so nothing can run a bundle but a TensorRT engine",
        "pip install 'edgemoe[ort]', with a GPU 'edgemoe[ort-gpu]'",
    )
    add(
        version is not None and release_numbers(version) < MINIMUM_VERSION,
        f"onnxruntime {version} does not run all bundles for targets cpu and cuda (`edgemoe"
        " inspect` says what each needs)",
        f"update it to {'.'.join(map(str, MINIMUM_VERSION))} or later (needs Python 3.11)",
    )
    add(
        "onnxruntime" in packages and "onnxruntime-gpu" in packages,
        "onnxruntime and onnxruntime-gpu are both installed and overwrite each other",
        "pip uninstall both, then install one",
    )
    add("tokenizers" not in packages, "tokenizers is missing", "pip install tokenizers")
    if jetson is not None:
        add(
            CUDA not in providers,
            "onnxruntime cannot use this Jetson's GPU (PyPI has no aarch64 GPU wheel)",
            "install the wheel that NVIDIA builds for your JetPack (Jetson AI Lab index)",
        )
        add(
            "tensorrt" not in packages,
            "TensorRT's Python package is not visible",
            "apt install python3-libnvinfer, and make the environment with"
            " --system-site-packages",
        )
        add(
            jetson.l4t is not None and jetson.jetpack is None,
            f"L4T {jetson.l4t} belongs to no JetPack known here",
            "update edgemoe; until then build engines on the device only",
        )
    elif compute_capability is not None:
        add(
            CUDA not in providers,
            "onnxruntime cannot use the GPU",
            "pip uninstall onnxruntime, then pip install 'edgemoe[ort-gpu]'",
        )
    add(
        sensors.throttling,
        f"the machine throttles now ({', '.join(sensors.throttling)})",
        "cool it, or choose a lower power mode with nvpmodel; both need your hands",
    )
    events = {name: count for name, count in sensors.over_current_events.items() if count}
    add(
        events,
        f"the supply was over its limit since boot ({events})",
        "use a stronger supply or a lower power mode",
    )
    available = sensors.memory_available_bytes
    add(
        available is not None and available < _LOW_MEMORY_BYTES,
        f"only {(available or 0) >> 20} MiB of memory are available",
        "stop other programs, or export with a lower precision",
    )
    return findings


def _installed_packages() -> dict[str, str]:
    found: dict[str, str] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # noqa: PERF203 (nine names, once)
            continue
    # JetPack's Python bindings may come without a distribution's metadata
    if "tensorrt" not in found and importlib.util.find_spec("tensorrt") is not None:
        found["tensorrt"] = "of unknown version"
    return found


def _execution_providers() -> tuple[str, ...]:
    try:
        ort: Any = importlib.import_module("onnxruntime")
        providers = ort.get_available_providers()
    except (ImportError, OSError, AttributeError):
        # reported as a finding: the list is empty
        return ()
    return tuple(str(name) for name in providers)


def _compute_capability(jetson: Jetson | None, *, live: bool) -> int | None:
    found = compute_capability() if live else None
    if found is None and jetson is not None and jetson.soc is not None:
        # without a driver that answers, the chip still identifies it
        return jetson.soc.compute_capability
    return found


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
