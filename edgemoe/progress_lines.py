"""Progress as lines of text, where stderr is no terminal: a log file, a service, CI.

A line is written when work has taken two seconds, then ever more rarely, and one at its end;
so hours of work are some dozens of lines. No line is ever rewritten.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_QUIET_S = 2.0  # work that is over by then writes nothing
_FIRST_PAUSE_S = 10.0
_MOST_LINES_PER_TENFOLD = 10  # after a pause of a tenth of the time so far


def describe_seconds(seconds: float) -> str:
    """Write a time for a person.

    Args:
        seconds: The time, in [0, inf).

    Returns:
        Such as `4s`, `1m20s` or `2h05m`.
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def _write(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


@dataclass
class LineProgress:
    """Progress of one piece of work, told in lines.

    Attributes:
        description: What is done.
        total: Steps in all; None where that is not known.
        clock: Returns seconds.
        write: Takes each line.
    """

    description: str
    total: int | None
    clock: Callable[[], float] = time.monotonic
    write: Callable[[str], None] = _write
    done: int = 0
    _start: float = field(init=False)
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._next = self._start + _QUIET_S

    def advance(self, note: str | None = None) -> None:
        """Count a step, and write a line where it is time for one.

        Args:
            note: A word on the step.
        """
        self.done += 1
        now = self.clock()
        if now < self._next or self.done == self.total:
            return
        so_far = now - self._start
        self._next = now + max(_FIRST_PAUSE_S, so_far / _MOST_LINES_PER_TENFOLD)
        counted = str(self.done) if self.total is None else f"{self.done} of {self.total}"
        parts = [f"{self.description}: {counted}"]
        parts += [] if note is None else [note]
        parts.append(f"{describe_seconds(so_far)} so far")
        if self.total is not None:
            left = so_far / self.done * (self.total - self.done)
            parts.append(f"about {describe_seconds(left)} left")
        self.write(", ".join(parts))

    def finish(self) -> None:
        """Write the total, where the work took long enough for a line."""
        took = self.clock() - self._start
        if took >= _QUIET_S:
            counted = f"{self.done} of {self.total}" if self.total is not None else self.done
            self.write(f"{self.description}: {counted}, {describe_seconds(took)} in all")


@dataclass
class StageLines:
    """Stages of one long command, one line each.

    Attributes:
        total: Stages at most.
        clock: Returns seconds.
        write: Takes each line.
    """

    total: int
    clock: Callable[[], float] = time.monotonic
    write: Callable[[str], None] = _write
    begun: int = 0
    _start: float = field(init=False)

    def __post_init__(self) -> None:
        self._start = self.clock()

    def begin(self, stage: str) -> None:
        """Write that a stage begins.

        Args:
            stage: What is done.
        """
        so_far, finished = self.clock() - self._start, self.begun
        self.begun += 1
        self.total = max(self.total, self.begun)
        line = f"stage {self.begun} of {self.total}: {stage}"
        if so_far >= _QUIET_S:
            line += f", {describe_seconds(so_far)} so far"
            # The first stages say little of the others.
            if finished >= 2:
                left = so_far / finished * (self.total - finished)
                line += f", about {describe_seconds(left)} left"
        self.write(line)

    def finish(self) -> None:
        """Write the total."""
        took = describe_seconds(self.clock() - self._start)
        self.write(f"done: {self.begun} stages, {took} in all")
