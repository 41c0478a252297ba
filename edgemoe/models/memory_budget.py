"""How much memory a model may take as a whole."""

from __future__ import annotations

import resource
from pathlib import Path

_GROUPS = (
    # Version 2 gives the limit of the own group at its root, version 1 in a folder of its own.
    (Path("/sys/fs/cgroup"), "memory.max"),
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
)
_FALLBACK_BYTES = 4 << 30


def default_limit() -> int:
    """Return how large a model or graph may be to be opened as a whole, in bytes.

    Returns:
        Half of what is available to this process. The other half is for what computing takes.
    """
    return available_memory() // 2


def available_memory() -> int:
    """Return what is available to this process, in bytes.

    Returns:
        The least of what the machine, the control group and resource limits leave.
    """
    return min([_available(), *_group_limits(), *_resource_limits()])


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return _FALLBACK_BYTES
    found = dict(line.split(":", 1) for line in lines)
    return int(found.get("MemAvailable", f"{_FALLBACK_BYTES >> 10} kB").split()[0]) << 10


def _group_limits() -> list[int]:
    try:
        lines = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        root, file = _GROUPS[0] if controllers == "" else _GROUPS[1]
        if controllers not in {"", "memory"}:
            continue
        own = root / name.lstrip("/")
        # In a container the own group is mounted as the root.
        for folder in (own, *own.parents):
            if folder == root or root in folder.parents:
                limits.extend(_read_limit(folder / file))
    return limits


def _read_limit(file: Path) -> list[int]:
    try:
        text = file.read_text(encoding="ascii").strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []


def _resource_limits() -> list[int]:
    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    limits = [resource.getrlimit(kind)[0] for kind in kinds]
    return [limit for limit in limits if limit != resource.RLIM_INFINITY]
