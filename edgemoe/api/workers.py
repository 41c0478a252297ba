"""Where verbs run their jobs: here, on processes of this machine, or on a Ray cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.api.arguments import check_at_least_one

if TYPE_CHECKING:
    from edgemoe.parallel.workers import ExecutorConfig


def choose_executor(
    workers: int | None, ray: str | None, *, gpus: bool | None = False
) -> ExecutorConfig:
    """Turn `workers` and `ray` into where jobs run.

    Args:
        workers: How many jobs at a time, in [1, inf); None for as many as the place has.
        ray: Address of the Ray cluster; None for processes of this machine.
        gpus: Whether each job on a cluster gets a GPU of its own; None where there are enough.

    Returns:
        The place; this process where neither is given.

    Raises:
        ArgumentError: `workers` is out of range.
    """
    from edgemoe.parallel.workers import InProcess, Processes, RayCluster

    check_at_least_one(workers=workers)
    if ray is not None:
        return RayCluster(address=ray, count=workers, gpus=gpus)
    return InProcess() if workers is None else Processes(workers)


def extras_of(ray: str | None) -> tuple[str, ...]:
    """Return the extra that a cluster needs.

    Args:
        ray: Address of the cluster, or None.

    Returns:
        Names for `edgemoe.api.extras.needs`.
    """
    return () if ray is None else ("ray",)
