"""Identify a Jetson, its JetPack and its GPU by the files that L4T leaves; reads only."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.device.sysfs import read_text

if TYPE_CHECKING:
    from pathlib import Path

_RELEASE = re.compile(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)")
# the longest prefix of the L4T release wins
_JETPACKS: dict[str, str] = {
    "35": "5.1",
    "36.2": "6.0 DP",
    "36.3": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4": "6.2.1",
    "36.5": "6.2.2",
    "38.2": "7.0",
    "38.4": "7.1",
    "39": "7.2",
}


@dataclass(frozen=True)
class Soc:
    """A Jetson system on chip: name, export target and compute capability."""

    name: str
    target: str | None
    compute_capability: int


_SOCS: dict[str, Soc] = {
    "tegra194": Soc("Xavier", None, 72),
    "tegra234": Soc("Orin", "jetson-orin", 87),
    "tegra264": Soc("Thor", "jetson-thor", 110),
}


@dataclass(frozen=True, kw_only=True)
class Jetson:
    """A Jetson module.

    Attributes:
        model: as the device tree says it, such as "NVIDIA Jetson AGX Orin".
        soc: what the module is built on, or None where it is unknown here.
        l4t: release of Linux for Tegra, such as "36.4.3", or None.
        jetpack: the JetPack that has this release, or None.
    """

    model: str
    soc: Soc | None
    l4t: str | None
    jetpack: str | None


def detect_jetson(root: Path) -> Jetson | None:
    """Return which Jetson this is, or None where it is another machine.

    Args:
        root: where the file system starts; "/" but in tests.
    """
    compatible = (read_text(root / "proc/device-tree/compatible") or "").replace(",", "\n")
    soc = next((_SOCS[word] for word in compatible.split() if word in _SOCS), None)
    match = _RELEASE.search(read_text(root / "etc/nv_tegra_release") or "")
    if soc is None and match is None:
        return None
    l4t = f"{match[1]}.{match[2]}" if match else None
    model = read_text(root / "proc/device-tree/model") or "unknown Jetson"
    return Jetson(model=model, soc=soc, l4t=l4t, jetpack=jetpack_of(l4t))


def jetpack_of(l4t: str | None) -> str | None:
    """Return the JetPack that carries an L4T release, or None where it is unknown."""
    if l4t is None:
        return None
    fitting = [prefix for prefix in _JETPACKS if f"{l4t}.".startswith(f"{prefix}.")]
    return _JETPACKS[max(fitting, key=len)] if fitting else None
