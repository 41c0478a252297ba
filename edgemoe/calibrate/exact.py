"""Sums that are exact, so that the order of addition cannot matter.

A float64 addition rounds, and what it rounds depends on what was added before. Here each
summand is rounded once, to a multiple of `UNIT`, which depends on nothing but itself;
from there on the sum is an integer number of units and addition is integer arithmetic. A sum is
kept as two arrays: its float64 value, which is what everybody reads, and the remainder, the
units between that value and the exact sum, which only addition reads. Both are a function of
the exact sum alone.

One unit is 2**-56 = 1.4e-17, finer than the rounding of a float64 from 1/8 upwards; a summand
is itself computed in float32 and sums stay below 2**57 = 1.4e17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from edgemoe.errors import StatisticsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

Float64: TypeAlias = "NDArray[np.float64]"
Int64: TypeAlias = "NDArray[np.int64]"

FRACTION_BITS = 56
UNIT = 2.0**-FRACTION_BITS
LIMIT = 2.0**57
_HALF = 1 << (FRACTION_BITS - 1)


def round_to_grid(values: Float64, name: str) -> Float64:
    """Round summands to multiples of `UNIT`.

    Args:
        values: float64 [...].
        name: What they are, for messages.

    Returns:
        float64 [...]; those of 1/8 and more are as they were.

    Raises:
        StatisticsError: One is not finite, or `LIMIT` or more.
    """
    _refuse_large(values, name)
    # Powers of two scale exactly. Adding zero turns -0.0 into 0.0: equal sums, equal bytes.
    return np.rint(values / UNIT) * UNIT + 0.0


def add_exactly(
    one: tuple[Float64, Int64], two: tuple[Float64, Int64], name: str
) -> tuple[Float64, Int64]:
    """Add two exact sums.

    Args:
        one: A sum as value, float64 [...], and remainder, int64 [...] in units.
        two: Another of the same shape.
        name: What they are, for messages.

    Returns:
        Their sum as value and remainder.

    Raises:
        StatisticsError: The sum is `LIMIT` or more.
    """
    wholes, units = (
        first + second for first, second in zip(_split(*one), _split(*two), strict=True)
    )
    # |units| < 2**62 up to here. Now to [-2**55, 2**55), which makes the pair unique.
    carry = (units + _HALF) >> FRACTION_BITS
    wholes += carry
    units -= carry << FRACTION_BITS
    value = np.asarray(wholes.astype(np.float64) + units.astype(np.float64) * UNIT)
    _refuse_large(value, name)
    near_whole, near_units = _split(value, np.zeros_like(units))
    remainder = ((wholes - near_whole) << FRACTION_BITS) + (units - near_units)
    return value, np.asarray(remainder)


def _split(value: Float64, remainder: Int64) -> tuple[Int64, Int64]:
    """Write value + remainder as wholes, |.| < 2**57, and units, |.| < 2**61."""
    whole = np.trunc(value)
    units = ((value - whole) / UNIT).astype(np.int64)
    return whole.astype(np.int64), units + remainder


def _refuse_large(values: Float64, name: str) -> None:
    # Written so that it holds for not-a-number too.
    if not (np.abs(values) < LIMIT).all():
        worst = values[~(np.abs(values) < LIMIT)].flat[0]
        raise StatisticsError(
            f"the sum {name} must stay below 2**57, got {worst:g}. The checkpoint overflows on "
            "this text: check that it runs in float32, or leave the text out."
        )
