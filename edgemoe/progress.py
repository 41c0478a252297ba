"""Progress on stderr for whatever takes longer than two seconds."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Item = TypeVar("Item")


def track(
    items: Iterable[Item], description: str, *, total: int | None = None
) -> Iterator[Item]:
    """Yield ``items`` while a bar on stderr shows how far along they are.

    Args:
        items: What to iterate over.
        description: What the bar says.
        total: Number of items, where ``items`` has no length.

    Yields:
        The items, unchanged. Nothing is drawn when stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        yield from items
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, description=description, total=total)
