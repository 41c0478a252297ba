"""What callers give: types and ranges, refused before anything is done with them."""

from __future__ import annotations

import math
import numbers
import operator
import os
from typing import TYPE_CHECKING, Any, cast

from edgemoe_runtime.errors import RequestError
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Sequence

# Far beyond it an engine runs out of threads or memory while it opens.
MOST_THREADS = 256
_SHOWN = 80  # characters of a value


def check_text(name: str, value: object) -> str:
    """Refuse what is no text that can be written as UTF-8.

    Args:
        name: the argument.
        value: its value.

    Returns:
        The text.

    Raises:
        RequestError: when it is no `str`, or has half a surrogate pair.
    """
    if not isinstance(value, str):
        hint = " Decode the bytes first." if isinstance(value, (bytes, bytearray)) else ""
        raise RequestError(f"{name} must be a str, got {quote(value, _SHOWN)}.{hint}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{name} must be valid Unicode, got the lone surrogate"
            f" U+{ord(value[error.start]):04X} at character {error.start}. Decode the bytes"
            " that it comes from with errors='replace'."
        ) from error
    return value


def check_texts(name: str, values: object) -> list[str]:
    """Refuse what is no list of texts; as `check_text` for each.

    Args:
        name: the argument.
        values: its value.

    Returns:
        The texts.

    Raises:
        RequestError: when it is no list or tuple of texts.
    """
    if not isinstance(values, (list, tuple)):
        raise RequestError(f"{name} must be a list of strings, got {quote(values, _SHOWN)}.")
    given = list(cast("Sequence[object]", values))
    return [check_text(f"{name}[{place}]", value) for place, value in enumerate(given)]


def check_count(name: str, value: Any, least: int, most: float = math.inf) -> int:
    """Refuse what is no whole number in a range; `True` is none.

    Args:
        name: the argument.
        value: its value; numpy's integers are as good.
        least: smallest allowed.
        most: largest allowed.

    Returns:
        The number.

    Raises:
        RequestError: when it is of another type or outside of the range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or not least <= number <= most:
        bound = "inf)" if most == math.inf else f"{most:.0f}]"
        raise RequestError(
            f"{name} must be a whole number in [{least}, {bound}, got {quote(value, _SHOWN)}."
        )
    return number


def check_number(name: str, value: Any, rule: str = "a finite number") -> float:
    """Refuse what is no finite number; `True` is none.

    Args:
        name: the argument.
        value: its value.
        rule: what a message says that it must be.

    Returns:
        The number.

    Raises:
        RequestError: when it is of another type, NaN or infinite.
    """
    is_number = not isinstance(value, bool) and isinstance(value, numbers.Real)
    try:
        number = float(value) if is_number else math.nan
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(f"{name} must be {rule}, got {quote(value, _SHOWN)}.")
    return number


def check_flag(name: str, value: object) -> bool:
    """Refuse what is neither true nor false.

    Args:
        name: the argument.
        value: its value.

    Returns:
        The value.

    Raises:
        RequestError: when it is of another type.
    """
    if not isinstance(value, bool):
        raise RequestError(f"{name} must be True or False, got {quote(value, _SHOWN)}.")
    return value


def check_threads(value: Any) -> int | None:
    """Refuse a number of threads that no engine can start.

    Args:
        value: threads; None leaves them to the engine.

    Returns:
        The number, or None.

    Raises:
        RequestError: when it is out of range.
    """
    if value is None:
        return None
    return check_count("threads", value, 1, max(MOST_THREADS, os.cpu_count() or 1))
