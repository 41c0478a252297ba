"""A command that was asked to end publishes nothing, also where Python ignored it."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor, thread
from typing import TYPE_CHECKING, Any

import pytest

from edgemoe.interruption import end_if_asked, interruptible
from edgemoe.staging import staged_directory, staged_file

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class _Thing:
    pass


@pytest.fixture
def terminal() -> Iterator[None]:
    """Handle Ctrl-C as at a terminal: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_that_python_ignores_is_not_forgotten(
    tmp_path: Path, number: signal.Signals, terminal: None
) -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    reached = []

    def write_interrupted(staged: Any) -> None:
        with interruptible(), staged(tmp_path / "out") as path:
            thing = _Thing()
            watch = weakref.ref(thing, lambda _: os.kill(os.getpid(), number))
            # What a callback of a weak reference raises is printed, and goes no further.
            del thing
            reached.append(watch())
            if staged is staged_file:
                path.write_text("half")

    for staged in (staged_directory, staged_file):
        with pytest.raises(KeyboardInterrupt):
            write_interrupted(staged)
    assert reached == [None, None]
    assert not list(tmp_path.iterdir())
    end_if_asked()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_thread_that_is_being_started_is_known_afterwards(
    number: signal.Signals, terminal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # CPython 3.13 starts threads by another function.
    name = next(
        name
        for name in ("_start_joinable_thread", "_start_new_thread")
        if hasattr(threading, name)
    )
    start, sent = getattr(threading, name), list[int]()

    def start_interrupted(*arguments: Any, **options: Any) -> Any:
        if not sent:
            sent.append(number)
            signal.raise_signal(number)
        return start(*arguments, **options)

    monkeypatch.setattr(threading, name, start_interrupted)
    pool = ThreadPoolExecutor(1)

    def work() -> None:
        with interruptible():
            pool.submit(int)
            time.sleep(30)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert sent == [number]
    # Python wakes those at exit that it finds here, and waits for all.
    (worker,) = pool._threads
    assert worker in thread._threads_queues
    pool.shutdown()
    assert not worker.is_alive()


def test_what_ignores_interruptions_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        found = []
        thread = threading.Thread(target=lambda: found.append(_handlers_inside()))
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        thread.start()
        thread.join()
        assert found == [handlers]
    finally:
        signal.signal(signal.SIGINT, before)


def _handlers_inside() -> tuple[object, object]:
    with interruptible():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
