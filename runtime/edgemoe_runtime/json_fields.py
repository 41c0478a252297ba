"""Strict, typed reading of one JSON document; every error names the path to the value."""

from __future__ import annotations

import math
import re
import stat
from typing import TYPE_CHECKING, NoReturn, TypeVar, cast

from edgemoe_runtime.errors import ManifestError
from edgemoe_runtime.hub_cache import resolve_blob
from edgemoe_runtime.input_files import parse_strict
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Json = None | bool | int | float | str | list["Json"] | dict[str, "Json"]
T = TypeVar("T")

_REMEDY = "Export the bundle again with a matching edgemoe."
_SHOWN_CHARACTERS = 80
_SHA256 = re.compile(r"[0-9a-f]{64}")


def read_plain_text(path: Path, max_bytes: int) -> str:
    """Read a UTF-8 file that is no pipe and no device, and is not too long.

    A link is refused unless it is one of a hub's cache.

    Args:
        path: the file.
        max_bytes: most bytes to read.

    Raises:
        ManifestError: when it is another kind of file, or longer.
        OSError: when it cannot be read.
        UnicodeDecodeError: when it is not UTF-8.
    """
    plain = path
    if path.is_symlink() and (blob := resolve_blob(path.parent, path)) is not None:
        plain = blob
    if not stat.S_ISREG(plain.lstat().st_mode):
        raise ManifestError(
            f"{path} must be a regular file and no link, unless a hub's cache made it and it"
            " leads into the cache's own folder blobs. Copy the bundle with `cp -rL` and use"
            " the copy."
        )
    with path.open("rb") as file:
        data = file.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise ManifestError(f"{path} must be at most {max_bytes} bytes, got more. {_REMEDY}")
    return data.decode("utf-8")


def parse_json(text: str, source: str) -> Json:
    """Parse strict JSON: no duplicate keys, no NaN or Infinity.

    Args:
        text: the document.
        source: what to call it in errors.

    Raises:
        ManifestError: when the text is not strict JSON.
    """
    try:
        return cast("Json", parse_strict(text))
    except ValueError as error:
        raise ManifestError(f"{source} must be strict JSON, got: {error}. {_REMEDY}") from error


class Value:
    """One JSON value together with the path that leads to it, and what to do about it."""

    def __init__(self, value: Json, path: str, remedy: str = _REMEDY) -> None:
        self._value = value
        self._path = path
        self._remedy = remedy

    def refuse(self, rule: str) -> NoReturn:
        """Raise a ManifestError that says the rule and the value.

        Raises:
            ManifestError: always.
        """
        shown = quote(self._value, _SHOWN_CHARACTERS)
        raise ManifestError(f"{self._path} must {rule}, got {shown}. {self._remedy}")

    def raw(self) -> Json:
        """Return the value unchecked."""
        return self._value

    def text(self) -> str:
        """Return a non-empty string."""
        if not isinstance(self._value, str) or not self._value:
            self.refuse("be a non-empty string")
        return self._value

    def one_of(self, *names: str) -> str:
        """Return a string that is one of the names."""
        if self._value not in names:
            self.refuse(f"be one of {', '.join(names)}")
        return self.text()

    def sha256(self) -> str:
        """Return 64 lower-case hexadecimal digits."""
        if not isinstance(self._value, str) or not _SHA256.fullmatch(self._value):
            self.refuse("be a sha256 in 64 lower-case hexadecimal digits")
        return self._value

    def integer(self, minimum: int) -> int:
        """Return an integer that is at least the minimum."""
        value = self._value
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.refuse(f"be an integer >= {minimum}")
        return value

    def integers(self, minimum: int) -> tuple[int, ...]:
        """Return a list of integers that are at least the minimum."""
        return tuple(item.integer(minimum) for item in self.items())

    def number(self) -> float:
        """Return a finite number."""
        value = self._value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            self.refuse("be a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            self.refuse("be a finite number")
        return number

    def boolean(self) -> bool:
        """Return true or false."""
        if not isinstance(self._value, bool):
            self.refuse("be true or false")
        return self._value

    def items(self) -> list[Value]:
        """Return the elements of a list."""
        if not isinstance(self._value, list):
            self.refuse("be a list")
        return [
            Value(item, f"{self._path}[{index}]", self._remedy)
            for index, item in enumerate(self._value)
        ]

    def mapping(self) -> dict[str, Value]:
        """Return the entries of an object with free keys."""
        if not isinstance(self._value, dict):
            self.refuse("be an object")
        return {
            name: Value(item, f"{self._path}.{name}", self._remedy)
            for name, item in self._value.items()
        }

    def free_form(self) -> dict[str, Json]:
        """Return an object whose content is not ours to check."""
        if not isinstance(self._value, dict):
            self.refuse("be an object")
        return self._value

    def fields(self, *names: str) -> Mapping[str, Value]:
        """Return the entries of an object that has exactly these keys."""
        entries = self.mapping()
        missing = [name for name in names if name not in entries]
        unknown = [name for name in entries if name not in names]
        if missing:
            raise ManifestError(
                f"{self._path} must have the keys {quote(missing)}. {self._remedy}"
            )
        if unknown:
            raise ManifestError(
                f"{self._path} must have no keys but {list(names)}, got {quote(unknown)}. "
                f"{self._remedy}"
            )
        return entries

    def optional(self, read: Callable[[Value], T]) -> T | None:
        """Return None for null, else what `read` makes of the value."""
        return None if self._value is None else read(self)
