"""What surrounds every verb: its packages are there, threads are set, progress is heard."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgemoe.api.arguments import check_at_least_one
from edgemoe.api.extras import needs
from edgemoe.progress import reporting_to

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemoe.progress import OnProgress


@contextlib.contextmanager
def running(
    *extras: str, threads: int | None = None, on_progress: OnProgress | None = None
) -> Iterator[None]:
    """Run a block as every verb runs.

    Args:
        extras: Extras of pyproject.toml that the verb needs.
        threads: CPU threads of torch in the block, in [1, inf); None leaves what they are.
        on_progress: As in `edgemoe.progress.reporting_to`.

    Yields:
        Nothing.

    Raises:
        MissingDependencyError: An extra is not installed.
        ArgumentError: `threads` is out of range.
    """
    check_at_least_one(threads=threads)
    needs(*extras)
    with reporting_to(on_progress), _cpu_threads(threads):
        yield


@contextlib.contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    if count is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
