"""Workers that are processes of this machine, each started when a job first needs it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import warnings
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from edgemoe.errors import SpreadError
from edgemoe.parallel.workers import Died, Failed, Outcome, Processes, Workers, perform

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from multiprocessing.context import SpawnProcess


class LocalProcesses(Workers):
    """Processes that live as long as this object, so that many short jobs import once."""

    def __init__(self, count: int) -> None:
        """Start none yet.

        Args:
            count: How many there may be.

        Raises:
            SpreadError: `count` is below 1.
        """
        if count < 1:
            raise SpreadError(f"the number of workers must be in [1, inf), got {count}.")
        self.executor = Processes(count)
        self.count = count
        # A fork would share locks and threads of torch in whatever state they are.
        self._context = multiprocessing.get_context("spawn")
        self._idle: list[tuple[SpawnProcess, Connection]] = []
        self._busy: dict[int, tuple[SpawnProcess, Connection]] = {}

    def _start(self, number: int, function: Callable[[Any], Any], job: Any) -> None:
        process, connection = self._idle.pop() if self._idle else self._new()
        self._busy[number] = (process, connection)
        try:
            connection.send((function, job))
        except BrokenPipeError:
            # It died idle; what waits for it finds that out.
            return
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SpreadError(
                f"a job must be picklable to reach another process, got {error}."
            ) from error

    def _new(self) -> tuple[SpawnProcess, Connection]:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs,), daemon=True)
        with _threads_that_sleep():
            process.start()
        # With our copy of it closed, its death closes the pipe.
        theirs.close()
        return process, ours

    def _wait(self, seconds: float) -> Iterable[tuple[int, Outcome]]:
        ready = wait([connection for _, connection in self._busy.values()], seconds)
        ended: list[tuple[int, Outcome]] = []
        for number, (process, connection) in list(self._busy.items()):
            if connection not in ready:
                continue
            del self._busy[number]
            try:
                outcome = connection.recv()
            except (EOFError, ConnectionResetError):
                connection.close()
                process.join()
                outcome = Died(_describe_exit(process.exitcode))
            else:
                self._idle.append((process, connection))
            ended.append((number, outcome))
        return ended

    def _stop(self) -> None:
        _end(self._busy.values())
        self._busy = {}

    def close(self) -> None:
        """End all processes."""
        self._stop()
        _end(self._idle)
        self._idle = []


@contextlib.contextmanager
def _threads_that_sleep() -> Iterator[None]:
    """Make OpenMP threads of a new process sleep while they wait.

    By default they spin, and processes that each have a thread for every core then keep the
    cores from one another.
    """
    name = "OMP_WAIT_POLICY"
    given = os.environ.get(name)
    os.environ.setdefault(name, "PASSIVE")
    try:
        yield
    finally:
        if given is None:
            del os.environ[name]


def _end(workers: Iterable[tuple[SpawnProcess, Connection]]) -> None:
    workers = list(workers)
    for process, connection in workers:
        connection.close()
        # Not SIGTERM: what a job leaves half done is made for sudden ends, and this is one.
        process.kill()
    for process, _ in workers:
        process.join()


def _describe_exit(status: int | None) -> str:
    if status is not None and status < 0:
        return f"killed by {signal.Signals(-status).name}"
    return f"exit status {status}"


def _work(connection: Connection) -> None:
    # Ctrl-C reaches every process of a terminal: the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    while True:
        try:
            function, job = connection.recv()
        except EOFError:
            return
        except Exception as error:
            text = f"a job must be importable where it runs, got {error!r}."
            connection.send(Failed(SpreadError(text), text))
            continue
        outcome = perform(function, job)
        try:
            connection.send(outcome)
        except BrokenPipeError:
            return
        except Exception as error:
            text = f"a result must be picklable, got one that is not: {error!r}."
            connection.send(Failed(SpreadError(text), text))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
