"""Functions that workers import."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from edgemoe.errors import PlanError
from edgemoe.parallel.worker_cache import get_or_create


def square(number: int) -> int:
    return number * number


def identify(_: int) -> int:
    time.sleep(0.05)
    return os.getpid()


def refuse_seven(number: int) -> int:
    if number == 7:
        raise PlanError("a number must not be seven, got 7.")
    return number


class TwoArguments(Exception):  # noqa: N818  an exception that pickle cannot put together again
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def raise_unpicklable(number: int) -> int:
    raise TwoArguments("this", f"that {number}")


def die_at_first(job: tuple[str, int]) -> int:
    """End without a word the first time that a job runs."""
    folder, number = job
    mark = Path(folder, str(number))
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def die(_: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep_long(folder: str) -> None:
    Path(folder, str(os.getpid())).touch()
    time.sleep(600)


opened = [0]


def open_once(key: str) -> int:
    """Tell how many things this process had to open up to this one."""

    def make() -> int:
        opened[0] += 1
        return opened[0]

    return get_or_create("thing", key, make)
