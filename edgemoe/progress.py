"""Progress on stderr for whatever takes longer than two seconds: one bar at a time.

Work that shows a bar may be a part of other work that does: only the outermost is drawn.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from rich.progress import Progress

Item = TypeVar("Item")

_drawn: list[Progress] = []


def track(
    items: Iterable[Item], description: str, *, total: int | None = None
) -> Iterator[Item]:
    """Yield `items` while a bar on stderr shows how far along they are.

    Args:
        items: What to iterate over.
        description: What the bar says.
        total: Number of items, where `items` has no length.

    Yields:
        The items, unchanged. Nothing is drawn when stderr is not a terminal.
    """
    if not _is_watched():
        yield from items
        return
    with _bar() as progress:
        yield from progress.track(items, description=description, total=total)


@contextlib.contextmanager
def counting(total: int, description: str) -> Iterator[Callable[[], None]]:
    """Show how far nested loops are along, and the time that is left.

    Args:
        total: Number of steps.
        description: What the bar says.

    Yields:
        A function to call after each step. Nothing is drawn when stderr is not a terminal.
    """
    if not _is_watched():
        yield lambda: None
        return
    with _bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


@contextlib.contextmanager
def telling(total: int, description: str) -> Iterator[Callable[[str], None]]:
    """Show how far steps are along, the time that is left, and a word on the last step.

    Args:
        total: Number of steps.
        description: What the bar says.

    Yields:
        A function to call with that word after each step. Nothing is drawn when stderr is not
        a terminal.
    """
    if not _is_watched():
        yield lambda _: None
        return
    with _bar() as progress:
        task = progress.add_task(description, total=total)
        yield lambda word: progress.update(
            task, advance=1, description=f"{description}, {word}"
        )


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
