"""Which intermediate channels an expert keeps, as text.

A channel is a gate row, an up row and a down column together. One bit stands for each, channel
0 for the highest bit of the first digit; the bits after the last channel are 0. An expert of 72
channels is 18 hexadecimal digits.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_BITS = 4
_DIGITS = re.compile("[0-9a-f]+")


def write_mask(kept: Iterable[int], size: int) -> str:
    """Write which channels are kept.

    Args:
        kept: Their numbers, in [0, size).
        size: How many the expert has, in [1, inf).

    Returns:
        Lower-case hexadecimal digits, a bit for each channel.
    """
    digits = -(-size // _BITS)
    value = 0
    for neuron in kept:
        value |= 1 << (digits * _BITS - 1 - neuron)
    return f"{value:0{digits}x}"


def is_mask(text: str) -> bool:
    """Return whether a text is what `write_mask` writes, for an expert of some size."""
    return _DIGITS.fullmatch(text) is not None


def fits_mask(text: str, size: int) -> bool:
    """Return whether a mask has a bit for each channel of an expert, and no other bit set.

    Args:
        text: A mask.
        size: How many channels the expert has.

    Returns:
        Whether it fits.
    """
    return len(text) == -(-size // _BITS) and read_mask(text)[-1:] < (size,)


def read_mask(text: str) -> tuple[int, ...]:
    """Read which channels are kept.

    Args:
        text: A mask.

    Returns:
        Their numbers, ascending.
    """
    bits = f"{int(text, 16):0{len(text) * _BITS}b}"
    return tuple(neuron for neuron, bit in enumerate(bits) if bit == "1")


def count_mask(text: str) -> int:
    """Count the channels that are kept.

    Args:
        text: A mask.

    Returns:
        How many, in [0, inf).
    """
    return int(text, 16).bit_count()
