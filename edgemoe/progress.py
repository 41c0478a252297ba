"""Progress of whatever takes longer than two seconds: a bar, lines, or calls to a listener.

On a terminal it is a bar. Commands write lines where stderr is none, functions write nothing.

Work that shows its progress may be a part of other work that does: only the outermost is shown.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from collections.abc import Sized
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from edgemoe.progress_lines import LineProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress

    Advance: TypeAlias = Callable[[str | None], None]

Item = TypeVar("Item")

_drawn: list[Progress] = []
_lines_wanted: ContextVar[bool] = ContextVar("edgemoe_progress_lines", default=False)


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """How far a piece of work is along.

    Attributes:
        description: What is done, such as `calibrate`.
        done: Steps that are finished, from 0 on.
        total: Steps in all; None where that is not known.
        note: A word on the last step, such as its loss; None where there is none.
    """

    description: str
    done: int
    total: int | None
    note: str | None = None


OnProgress: TypeAlias = "Callable[[ProgressEvent], None]"


@dataclass
class _Listener:
    """Who is called instead of a bar being drawn, and whether it follows some work already."""

    call: OnProgress
    is_busy: bool = False


_listener: ContextVar[_Listener | None] = ContextVar("edgemoe_progress", default=None)


@contextlib.contextmanager
def reporting_to(on_progress: OnProgress | None) -> Iterator[None]:
    """Send the progress of a block to a function instead of drawing bars.

    Args:
        on_progress: Called with a `ProgressEvent` when work begins and after each of its
            steps; what it raises ends the work. None changes nothing.

    Yields:
        Nothing.
    """
    if on_progress is None:
        yield
        return
    before = _listener.get()
    _listener.set(_Listener(on_progress))
    try:
        yield
    finally:
        _listener.set(before)


@contextlib.contextmanager
def in_lines() -> Iterator[None]:
    """Write progress as lines in a block, where stderr is no terminal and nobody listens.

    Yields:
        Nothing.
    """
    token = _lines_wanted.set(True)
    try:
        yield
    finally:
        _lines_wanted.reset(token)


def track(
    items: Iterable[Item], description: str, *, total: int | None = None
) -> Iterator[Item]:
    """Yield `items` while their progress is shown.

    Args:
        items: What to iterate over.
        description: What the bar says.
        total: Number of items, where `items` has no length.

    Yields:
        The items, unchanged.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    with _shown(total, description) as advance:
        for item in items:
            yield item
            advance(None)


@contextlib.contextmanager
def counting(total: int, description: str) -> Iterator[Callable[[], None]]:
    """Show how far nested loops are along, and the time that is left.

    Args:
        total: Number of steps.
        description: What the bar says.

    Yields:
        A function to call after each step.
    """
    with _shown(total, description) as advance:
        yield lambda: advance(None)


@contextlib.contextmanager
def telling(total: int, description: str) -> Iterator[Callable[[str], None]]:
    """Show how far steps are along, the time that is left, and a word on the last step.

    Args:
        total: Number of steps.
        description: What the bar says.

    Yields:
        A function to call with that word after each step.
    """
    with _shown(total, description) as advance:
        yield advance


@contextlib.contextmanager
def _shown(total: int | None, description: str) -> Iterator[Advance]:
    """Yield a function to call after each step, with a word on it or None."""
    listener = _listener.get()
    if listener is not None and not listener.is_busy:
        with _heard(listener, total, description) as advance:
            yield advance
    elif listener is None and _is_watched():
        with _bar() as bar:
            task = bar.add_task(description, total=total)
            yield lambda note: bar.update(
                task,
                advance=1,
                description=description if note is None else f"{description}, {note}",
            )
    elif listener is None and _lines_wanted.get() and not sys.stderr.isatty():
        # What is inside of this work is a part of it.
        token = _lines_wanted.set(False)
        lines = LineProgress(description, total)
        try:
            yield lines.advance
            lines.finish()
        finally:
            _lines_wanted.reset(token)
    else:
        yield lambda _: None


@contextlib.contextmanager
def _heard(listener: _Listener, total: int | None, description: str) -> Iterator[Advance]:
    done = 0

    def tell(note: str | None = None) -> None:
        listener.call(ProgressEvent(description=description, done=done, total=total, note=note))

    def advance(note: str | None) -> None:
        nonlocal done
        done += 1
        tell(note)

    listener.is_busy = True
    try:
        tell()
        yield advance
    finally:
        listener.is_busy = False


def _is_watched() -> bool:
    # A device has no rich: what it runs is done in silence.
    return not _drawn and sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    from rich import progress as bars
    from rich.console import Console

    bar = bars.Progress(
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
        console=Console(stderr=True),
        # A decoder layer takes longer to load than one step: the speed is that of minutes.
        speed_estimate_period=600,
        transient=True,
    )
    _drawn.append(bar)
    try:
        with bar:
            yield bar
    finally:
        _drawn.remove(bar)
