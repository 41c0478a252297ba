"""Workers that run a picklable function over jobs, wherever they are.

    with edgemoe.parallel.opening.open_workers(Processes(4)) as workers:
        results = workers.map(function, jobs, "what the bar says")

Results come in the order of the jobs. The first failure ends the call and is raised as the
worker raised it. A worker that dies (killed, out of memory, its machine gone) is no failure of
the job: another worker gets it, up to `ATTEMPTS` times in all. What a job finished before
is for the job to find again: `edgemoe.resume` is made for that.
"""

from __future__ import annotations

import abc
import contextlib
import pickle
import traceback
from collections import Counter, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from edgemoe.errors import SpreadError
from edgemoe.progress import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

Job = TypeVar("Job")
Result = TypeVar("Result")

ATTEMPTS = 3
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class InProcess:
    """In this process, one job after another."""


@dataclass(frozen=True)
class Processes:
    """On processes of this machine.

    Attributes:
        count: How many, in [1, inf).
    """

    count: int


@dataclass(frozen=True, kw_only=True)
class RayCluster:
    """On a Ray cluster.

    Attributes:
        address: `local` starts one on this machine, `auto` finds the one that this machine
            belongs to, `host:port` and `ray://host:port` name one.
        count: Jobs at a time; None for one on each machine.
        gpus: Whether each job gets a GPU of its own; None where there are enough.
    """

    address: str
    count: int | None = None
    gpus: bool | None = False


ExecutorConfig: TypeAlias = "InProcess | Processes | RayCluster"


@dataclass(frozen=True)
class JobProgress:
    """Progress within jobs, where they tell of it.

    Attributes:
        total: Steps of all jobs together.
        done: Returns how many are done; called about twice a second.
    """

    total: int
    done: Callable[[], int]


@dataclass(frozen=True)
class Done:
    """A job's result."""

    value: Any


@dataclass(frozen=True)
class Failed:
    """Exception that a job raised, and its traceback."""

    error: Exception
    trace: str


@dataclass(frozen=True)
class Died:
    """Reason why a worker ended in the middle of a job."""

    reason: str


Outcome: TypeAlias = "Done | Failed | Died"


class WorkerTraceback(Exception):  # noqa: N818  a cause, as concurrent.futures has it
    """The traceback of a failure in a worker, as text: frames cannot be sent."""


class Workers(abc.ABC):
    """Where jobs run.

    Attributes:
        executor: Where that is.
        count: How many jobs run at a time.
    """

    executor: ExecutorConfig
    count: int

    def map(
        self,
        function: Callable[[Job], Result],
        jobs: Sequence[Job],
        description: str,
        *,
        steps: JobProgress | None = None,
    ) -> list[Result]:
        """Run a function over jobs.

        Args:
            function: A function of a module that workers can import.
            jobs: Its arguments; they, results and exceptions are pickled.
            description: What the progress bar says.
            steps: Progress within jobs; by default jobs are counted.

        Returns:
            The results in the order of the jobs.

        Raises:
            SpreadError: A job's workers died `ATTEMPTS` times, or it cannot be sent.
            Exception: What the first job that failed raised.
        """
        results: dict[int, Result] = {}
        attempts: Counter[int] = Counter()
        waiting = deque(range(len(jobs)))
        shown = running = 0
        total = len(jobs) if steps is None else steps.total
        with counting(total, description) as advance, self._stopping():
            while len(results) < len(jobs):
                while waiting and running < self.count:
                    number = waiting.popleft()
                    attempts[number] += 1
                    running += 1
                    self._start(number, function, jobs[number])
                for number, outcome in self._wait(_POLL_SECONDS):
                    running -= 1
                    if isinstance(outcome, Failed):
                        raise outcome.error from WorkerTraceback(outcome.trace)
                    if isinstance(outcome, Done):
                        results[number] = outcome.value
                    elif attempts[number] < ATTEMPTS:
                        waiting.appendleft(number)
                    else:
                        raise SpreadError(
                            f"a worker must live until its job is done, got job {number + 1} "
                            f"of {len(jobs)}, whose worker died {ATTEMPTS} times, last: "
                            f"{outcome.reason}. Use fewer workers if memory is short."
                        )
                done = len(results) if steps is None else min(steps.done(), total)
                while shown < done:
                    advance()
                    shown += 1
        return [results[number] for number in range(len(jobs))]

    @contextlib.contextmanager
    def _stopping(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._stop()
            raise

    @abc.abstractmethod
    def _start(self, number: int, function: Callable[[Any], Any], job: Any) -> None:
        """Start a job on a free worker."""

    @abc.abstractmethod
    def _wait(self, seconds: float) -> Iterable[tuple[int, Outcome]]:
        """Wait for jobs to end, at most so long, and return those that have."""

    @abc.abstractmethod
    def _stop(self) -> None:
        """End the jobs that run."""

    def close(self) -> None:
        """Release what the workers hold."""
        self._stop()


def perform(function: Callable[[Any], Any], job: Any) -> Done | Failed:
    """Run one job, in the worker.

    Args:
        function: The function.
        job: Its argument.

    Returns:
        The result, or the exception in a form that can be sent.
    """
    try:
        return Done(function(job))
    except Exception as error:
        return Failed(_sendable(error), traceback.format_exc())


def _sendable(error: Exception) -> Exception:
    try:
        copy = pickle.loads(pickle.dumps(error))  # noqa: S301  of our own making
    except Exception:
        copy = None
    if type(copy) is type(error):
        return error
    return SpreadError(f"a job failed with {type(error).__name__}: {error}")
