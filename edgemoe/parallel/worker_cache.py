"""What a worker opened for one job and keeps for the next: a model, statistics.

Jobs are small so that they spread, and what they need is large. A job asks for it by what it
is; the first job of a process opens it, later ones find it there. A process holds one thing of
each kind: another one takes its place, and the old one goes first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

Thing = TypeVar("Thing")

_held: dict[str, tuple[Hashable, Any]] = {}


def get_or_create(kind: str, key: Hashable, make: Callable[[], Thing]) -> Thing:
    """Return what this process holds, or open it and hold it.

    Args:
        kind: What it is, such as `model`.
        key: Which one.
        make: Opens it.

    Returns:
        The thing. Who changes it must put it back.
    """
    if kind not in _held or _held[kind][0] != key:
        _held.pop(kind, None)
        _held[kind] = (key, make())
    thing: Thing = _held[kind][1]
    return thing


def clear_cache() -> None:
    """Forget all that this process holds."""
    _held.clear()
