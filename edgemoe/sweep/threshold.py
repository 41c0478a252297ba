"""The deepest cut that holds: whose loss is, with 95% confidence, under what is allowed.

A cut holds where the upper end of the 95% interval of its drop is at most the largest drop
allowed, with every seed. It counts only if every shallower cut of the same method holds too: a
single ratio that does better than its neighbours is more likely luck than knowledge.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.evaluate.gate import is_within

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method, recovered or not, at one fraction, over its seeds.

    Attributes:
        series: The method, and how its cuts were recovered.
        keep: Fraction that was asked for.
        kept_fraction: Fraction of the routed experts' parameters that is left.
        drop: Mean drop of the seeds.
        upper: Largest upper end of the seeds' 95% intervals.
        is_cut: Whether anything was cut.
    """

    series: str
    keep: float
    kept_fraction: float
    drop: float
    upper: float
    is_cut: bool


def find_threshold(points: Iterable[Point], max_drop: float) -> Point | None:
    """Find the deepest cut of one method that holds.

    Args:
        points: The method's points.
        max_drop: The largest drop allowed.

    Returns:
        The point of the smallest kept fraction such that it and all points of larger ones
        hold; None where there is no such cut.
    """
    deepest = None
    for point in sorted(points, key=lambda point: (-point.kept_fraction, -point.keep)):
        if not is_within(point.upper, max_drop):
            break
        if point.is_cut:
            deepest = point
    return deepest


def choose_deepest(thresholds: Iterable[Point | None]) -> Point | None:
    """Choose among the thresholds of several methods.

    Args:
        thresholds: One per method.

    Returns:
        The deepest; of equally deep ones that of the smallest drop. None where there is none.
    """
    found = [point for point in thresholds if point is not None]
    return min(found, key=lambda point: (point.kept_fraction, point.drop), default=None)


def find_nearest(points: Iterable[Point]) -> Point | None:
    """Find the cut that is nearest to holding.

    Args:
        points: Points of all methods.

    Returns:
        The cut whose upper end is lowest; None where nothing was cut.
    """
    candidates = [point for point in points if point.is_cut]
    return min(candidates, key=lambda point: point.upper, default=None)
