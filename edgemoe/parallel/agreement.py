"""What workers must have in common with whoever sends them jobs, or results would differ."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

from edgemoe.errors import SpreadError
from edgemoe.parallel.workers import RayCluster
from edgemoe.versions import library_versions

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemoe.parallel.workers import ExecutorConfig


def check_agreement(directories: Mapping[str, Path], versions: Mapping[str, str]) -> None:
    """Check, in a worker, that it sees the same files and has the same versions.

    Args:
        directories: Absolute directories by what they are.
        versions: What `edgemoe.versions.library_versions` gave where the job is from.

    Raises:
        SpreadError: This machine does not see a directory, or has other versions.
    """
    for what, directory in directories.items():
        if not directory.is_dir():
            raise SpreadError(
                f"the {what} must be at the same path for every worker, got {directory}, which "
                f"{platform.node()} does not see. Put it on a file system that all share."
            )
    if library_versions() != versions:
        raise SpreadError(
            f"every worker must have the versions {versions}, got {library_versions()} on "
            f"{platform.node()}. Install the same there."
        )


def threads_of(executor: ExecutorConfig, wanted: int | None) -> int | None:
    """Return the CPU threads that a job computes with.

    The number of threads decides how some products are summed: as many as in one process give
    the bits of one process. A cluster's machines have their own number, which Ray sets.

    Args:
        executor: Where jobs run.
        wanted: What was asked for, in [1, inf).

    Returns:
        That; without, those of this process; None, on a cluster, what the worker has.
    """
    if wanted is not None:
        return wanted
    import torch

    if isinstance(executor, RayCluster) and executor.address != "local":
        return None
    return torch.get_num_threads()
