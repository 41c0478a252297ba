"""Workers that are tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import warnings
from typing import TYPE_CHECKING, Any

from edgemoe.errors import MissingDependencyError, SpreadError
from edgemoe.parallel.workers import Died, Outcome, RayCluster, Workers, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Nothing is reported home, and no accelerator is hidden from those that ask for none.
_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

_ANSWER_SECONDS = 10.0


class ClusterWorkers(Workers):
    """Ray tasks, as many at a time as there are workers."""

    def __init__(self, executor: RayCluster) -> None:
        """Connect to a cluster, or start one.

        Args:
            executor: Which, and how many jobs at a time.

        Raises:
            MissingDependencyError: Ray is not installed.
            SpreadError: The cluster cannot be reached, or has no machine with a CPU.
        """
        for name, value in _SETTINGS.items():
            os.environ.setdefault(name, value)
        try:
            import ray
        except ImportError as error:
            raise MissingDependencyError(
                "a Ray cluster needs the extra 'ray': ray is not installed. "
                "Run: pip install 'edgemoe[ray]'"
            ) from error
        self.executor = executor
        self._ray: Any = ray
        self._running: dict[Any, int] = {}
        # An application may have connected already; then it also disconnects.
        self._is_ours = not ray.is_initialized()
        if self._is_ours:
            _connect(ray, executor)
        try:
            cpus = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
            machines = [int(count) for count in cpus if count >= 1]
            self.count, cpus_each = share_out(machines, executor.count)
            gpus = ray.cluster_resources().get("GPU", 0)
        except BaseException:
            self.close()
            raise
        gpus_each = gpus >= self.count if executor.gpus is None else executor.gpus
        if gpus_each and gpus < 1:
            self.close()
            raise SpreadError(
                "a GPU for each worker must be in the Ray cluster, got a cluster without. "
                "Use the CPU."
            )
        # Deaths are counted in one place for all kinds of workers, so not by Ray.
        self._task: Any = ray.remote(
            num_cpus=cpus_each,
            num_gpus=int(gpus_each),
            max_retries=0,
            scheduling_strategy="SPREAD",
        )(perform)

    def _start(self, number: int, function: Callable[[Any], Any], job: Any) -> None:
        self._running[self._task.remote(function, job)] = number

    def _wait(self, seconds: float) -> Iterable[tuple[int, Outcome]]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=seconds)
        return [(self._running.pop(reference), self._outcome(reference)) for reference in ready]

    def _outcome(self, reference: Any) -> Outcome:
        exceptions = self._ray.exceptions
        try:
            outcome: Outcome = self._ray.get(reference)
        except exceptions.RayTaskError as error:
            # A job's own exceptions come as results: this one kept the job from starting.
            raise SpreadError(
                "the same edgemoe must be installed on every machine of the Ray cluster, got "
                f"{_last_line(error)}"
            ) from error
        except exceptions.RayError as error:
            return Died(_last_line(error))
        return outcome

    def _stop(self) -> None:
        for reference in self._running:
            with contextlib.suppress(Exception):
                self._ray.cancel(reference, force=True)
        self._running = {}

    def close(self) -> None:
        """End the jobs, and the cluster if it was started here."""
        self._stop()
        if self._is_ours:
            with warnings.catch_warnings():
                # Ray does not wait for the processes that it ends: Python remarks on that
                # when it forgets them, so let it forget them here.
                warnings.simplefilter("ignore")
                self._ray.shutdown()
                gc.collect()


def share_out(machines: list[int], count: int | None) -> tuple[int, int]:
    """Compute how many jobs run at a time, and how many CPUs each may use.

    Args:
        machines: CPUs of each machine, each in [1, inf).
        count: Jobs at a time; None for one on each machine.

    Returns:
        Jobs at a time and CPUs of each; the smallest machine holds its share of the jobs.

    Raises:
        SpreadError: There is no machine, or `count` is below 1.
    """
    if not machines:
        raise SpreadError(
            "a Ray cluster must have a machine with a CPU, got none. Start one with: "
            "ray start --head"
        )
    if count is not None and count < 1:
        raise SpreadError(f"the number of workers must be in [1, inf), got {count}.")
    count = len(machines) if count is None else count
    on_each = -(-count // len(machines))
    return count, max(1, min(machines) // on_each)


def _connect(ray: Any, executor: RayCluster) -> None:
    options: dict[str, Any] = {"address": executor.address}
    if executor.address == "local":
        cpus = max(os.cpu_count() or 1, executor.count or 1)
        options.update(num_cpus=cpus, include_dashboard=False)
    host, _, port = executor.address.removeprefix("ray://").rpartition(":")
    try:
        if port.isdigit():
            # Ray itself tries for five minutes.
            socket.create_connection((host, int(port)), _ANSWER_SECONDS).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        raise SpreadError(
            f"a Ray cluster must answer at {executor.address!r}, got: {_last_line(error)}. "
            "Start one with `ray start --head`, or use `local`."
        ) from error


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
