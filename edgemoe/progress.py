"""Progress on stderr for whatever takes longer than two seconds."""

from __future__ import annotations

import importlib.util
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
    # A device has no rich: what it runs is done in silence.
    if not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield from items
        return
    from rich import progress as bars
    from rich.console import Console

    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield from progress.track(items, description=description, total=total)
