"""Options of commands that can use more than one process."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe.parallel.workers import Place


def choose_place(workers: int | None, ray_address: str | None) -> Place:
    """Turn ``--workers`` and ``--ray`` into where jobs run.

    Args:
        workers: How many jobs at a time; None for as many as the place has.
        ray_address: The Ray cluster; None for processes of this machine.

    Returns:
        The place; this process where neither is given.
    """
    from edgemoe.parallel.workers import Here, Processes, RayCluster

    if ray_address is not None:
        return RayCluster(address=ray_address, count=workers)
    return Here() if workers is None else Processes(workers)
