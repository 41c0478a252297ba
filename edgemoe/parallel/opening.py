"""Start workers where they are asked for: in this process, on processes, on a Ray cluster."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from edgemoe.parallel.cluster import ClusterWorkers
from edgemoe.parallel.processes import LocalProcesses
from edgemoe.parallel.worker_cache import clear_cache
from edgemoe.parallel.workers import (
    ExecutorConfig,
    InProcess,
    Outcome,
    Processes,
    Workers,
    perform,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator


class _Here(Workers):
    executor = InProcess()
    count = 1

    def __init__(self) -> None:
        self._ended: list[tuple[int, Outcome]] = []

    def _start(self, number: int, function: Callable[[Any], Any], job: Any) -> None:
        self._ended.append((number, perform(function, job)))

    def _wait(self, seconds: float) -> Iterable[tuple[int, Outcome]]:
        del seconds
        ended, self._ended = self._ended, []
        return ended

    def _stop(self) -> None:
        self._ended = []

    def close(self) -> None:
        """Release what jobs opened: this process goes on without them."""
        clear_cache()


@contextlib.contextmanager
def open_workers(executor: ExecutorConfig | Workers) -> Iterator[Workers]:
    """Start workers, or connect to them.

    Args:
        executor: Where; workers that are open serve as they are.

    Yields:
        The workers. Those that were not open before end with the block; a cluster that was
        running before does not.

    Raises:
        SpreadError: The cluster cannot be reached, or has nothing to run jobs on.
        MissingDependencyError: Ray is not installed.
    """
    if isinstance(executor, Workers):
        yield executor
        return
    workers: Workers
    if isinstance(executor, InProcess):
        workers = _Here()
    elif isinstance(executor, Processes):
        workers = LocalProcesses(executor.count)
    else:
        workers = ClusterWorkers(executor)
    with contextlib.closing(workers):
        yield workers
