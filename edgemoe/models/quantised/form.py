"""What a stored form of weights is: where its parts lie, and how they become one. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

# Type and shape of each stored tensor, by name, as headers of safetensors say them.
Headers: TypeAlias = "Mapping[str, tuple[str, list[int]]]"
Shape: TypeAlias = "tuple[int, ...]"


class UnreadableFormError(ValueError):
    """An announcement or a tensor is not what edgemoe reads; says what was got."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One weight, and the stored tensors that it is made of.

    Attributes:
        target: Its name in a plain checkpoint.
        shape: Its shape there.
        rule: Name of the arithmetic in `decoding`.
        parts: Names of the stored tensors, by what they are to the arithmetic.
        settings: What else the arithmetic takes.
        is_stack: Whether it holds one weight for each expert, made one at a time.
    """

    target: str
    shape: Shape
    rule: str
    parts: Mapping[str, str]
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_stack: bool = False


@dataclass(frozen=True, kw_only=True)
class Form:
    """How a checkpoint stores its quantised weights.

    Attributes:
        says: The same in words, such as `fp8 e4m3 with block scales 128x128`.
        find: Lists the weights that are stored so; raises `UnreadableFormError`.
    """

    says: str
    find: Callable[[Headers], Iterator[Piece]]


def check_entries(settings: Mapping[str, Any], known: set[str], where: str) -> None:
    """Refuse entries whose meaning is not known: they may change what the weights are.

    Args:
        settings: What is announced.
        known: Entries that are understood, or known to change nothing here.
        where: What they belong to, for the message.

    Raises:
        UnreadableFormError: There are others.
    """
    # An empty entry asks for nothing.
    unknown = sorted(
        name for name, value in settings.items() if name not in known and value not in _EMPTY
    )
    if unknown:
        raise UnreadableFormError(f"{where} with the unknown entry {clip(unknown[0])!r}")


_EMPTY: tuple[Any, ...] = (None, False, "", [], {})


def need(
    headers: Headers, name: str, owner: str, types: tuple[str, ...], shapes: tuple[Shape, ...]
) -> str:
    """Look for a part that a quantised weight cannot be read without.

    Args:
        headers: All stored tensors.
        name: The part's name.
        owner: What it belongs to.
        types: Types that it may have.
        shapes: Shapes that it may have.

    Returns:
        Its name.

    Raises:
        UnreadableFormError: It is missing, or of another type or shape.
    """
    if name not in headers:
        raise UnreadableFormError(f"{owner} without {name}")
    dtype, shape = headers[name]
    if dtype not in types or tuple(shape) not in shapes:
        wanted = " or ".join(str(list(one)) for one in dict.fromkeys(shapes))
        raise UnreadableFormError(
            f"{name} of type {dtype} and shape {shape}, where {owner} wants {wanted} of "
            f"{' or '.join(types)}"
        )
    return name


def whole_number(settings: Mapping[str, Any], name: str, where: str, least: int = 1) -> int:
    """Return a whole number that is announced.

    Args:
        settings: What is announced.
        name: The entry.
        where: What it belongs to, for the message.
        least: Smallest value.

    Returns:
        The number.

    Raises:
        UnreadableFormError: It is missing or something else.
    """
    found = settings.get(name)
    if not isinstance(found, int) or isinstance(found, bool) or found < least:
        raise UnreadableFormError(f"{where} with {name} {clip(str(found))}")
    return found
