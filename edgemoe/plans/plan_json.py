"""Read a plan's JSON strictly: every key known, every value of its type, every place named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from edgemoe.errors import PlanError
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Callable

Built = TypeVar("Built")
_REMEDY = "Correct the plan, or make it again with `edgemoe prune`."


@dataclass(frozen=True)
class PlanReader:
    """Hands out the entries of one JSON object, each once.

    Attributes:
        left: Entries that were not asked for yet.
        place: Where the object is, for messages.
    """

    left: dict[str, Any]
    place: str

    @classmethod
    def parse(cls, text: str, source: str) -> PlanReader:
        """Read JSON that must hold one object.

        Args:
            text: JSON.
            source: What messages call it.

        Returns:
            A reader of the object.

        Raises:
            PlanError: The text is no JSON, or no object, or repeats a key.
        """
        try:
            found = parse_strict(text)
            # What cannot be written again, such as half a surrogate pair, has no stable bytes.
            json.dumps(found, ensure_ascii=False, allow_nan=False).encode()
        except ValueError as error:
            raise PlanError(
                f"{source}: a plan must be JSON, got: {error}. {_REMEDY}"
            ) from error
        if not isinstance(found, dict):
            raise PlanError(
                f"{source}: a plan must be a JSON object, got a {type(found).__name__}. "
                f"{_REMEDY}"
            )
        return cls(found, source)

    def expect(self, key: str, value: object) -> None:
        """Take an entry that must have one value.

        Args:
            key: Its name.
            value: Its only value.

        Raises:
            PlanError: It has another.
        """
        found = self._take(key)
        if found != value or isinstance(found, bool):
            self._refuse(key, f"{value!r}", found)

    def string(self, key: str) -> str:
        """Take a string.

        Args:
            key: Its name.

        Returns:
            The string.
        """
        found = self._take(key)
        if not isinstance(found, str):
            self._refuse(key, "a string", found)
        return found

    def optional_string(self, key: str) -> str | None:
        """Take a string, or null; absent is null.

        Args:
            key: Its name.

        Returns:
            The string, or None.
        """
        return None if self._is_null(key) else self.string(key)

    def integer(self, key: str) -> int:
        """Take an integer in [0, inf).

        Args:
            key: Its name.

        Returns:
            The integer.
        """
        found = self._take(key)
        if not _is_natural(found):
            self._refuse(key, "an integer in [0, inf)", found)
        return int(found)

    def optional_integer(self, key: str) -> int | None:
        """Take an integer in [0, inf), or null; absent is null.

        Args:
            key: Its name.

        Returns:
            The integer, or None.
        """
        return None if self._is_null(key) else self.integer(key)

    def integers(self, key: str) -> tuple[int, ...]:
        """Take a list of integers in [0, inf).

        Args:
            key: Its name.

        Returns:
            The integers.
        """
        found = self._take(key)
        if not isinstance(found, list) or not all(_is_natural(value) for value in found):
            self._refuse(key, "a list of integers in [0, inf)", found)
        return tuple(found)

    def optional_pairs(self, key: str, count: int) -> tuple[tuple[int, int], ...] | None:
        """Take a list of pairs of integers in [0, inf), or one pair for all, or null.

        Args:
            key: Its name.
            count: How many times one pair counts.

        Returns:
            The pairs, or None.
        """
        if self._is_null(key):
            return None
        found = self._take(key)
        pairs = [found] * count if _is_pair(found) else found
        if not isinstance(pairs, list) or not all(_is_pair(pair) for pair in pairs):
            self._refuse(key, "a pair of integers in [0, inf) or a list of pairs", found)
        return tuple((pair[0], pair[1]) for pair in pairs)

    def optional_numbers(self, key: str) -> tuple[float, ...] | None:
        """Take a list of numbers, or null; absent is null.

        Args:
            key: Its name.

        Returns:
            The numbers, or None.
        """
        if self._is_null(key):
            return None
        found = self._take(key)
        if not isinstance(found, list) or any(
            isinstance(value, bool) or not isinstance(value, int | float) for value in found
        ):
            self._refuse(key, "a list of numbers", found)
        return tuple(float(value) for value in found)

    def mapping(self, key: str) -> dict[str, Any]:
        """Take an object with any entries.

        Args:
            key: Its name.

        Returns:
            The object.
        """
        found = self._take(key)
        if not isinstance(found, dict):
            self._refuse(key, "an object", found)
        return found

    def optional_object(self, key: str) -> PlanReader | None:
        """Take an object, or null; absent is null.

        Args:
            key: Its name.

        Returns:
            A reader of it, or None.
        """
        if self._is_null(key):
            return None
        return PlanReader(self.mapping(key), f"{self.place}: {key}")

    def objects(self, key: str) -> list[PlanReader]:
        """Take a list of objects.

        Args:
            key: Its name.

        Returns:
            A reader of each.
        """
        found = self._take(key)
        if not isinstance(found, list) or not all(isinstance(value, dict) for value in found):
            self._refuse(key, "a list of objects", found)
        return [
            PlanReader(value, f"{self.place}: {key}[{index}]")
            for index, value in enumerate(found)
        ]

    def build(self, make: Callable[..., Built], **entries: Any) -> Built:
        """Make what the object describes, and say where it is if that is refused.

        Args:
            make: A constructor.
            **entries: Its arguments.

        Returns:
            What it made.

        Raises:
            PlanError: The constructor refused the entries.
        """
        try:
            return make(**entries)
        except PlanError as error:
            raise PlanError(f"{self.place}: {error}") from error

    def finish(self) -> None:
        """Refuse entries that nobody asked for.

        Raises:
            PlanError: There is one.
        """
        if self.left:
            raise PlanError(
                f"{self.place} must have known keys only, got {sorted(self.left)}. Remove "
                "them, or correct their spelling."
            )

    def _take(self, key: str) -> Any:
        if key not in self.left:
            raise PlanError(f"{self.place} must have the key {key!r}, got none. {_REMEDY}")
        return self.left.pop(key)

    def _is_null(self, key: str) -> bool:
        if self.left.get(key) is not None:
            return False
        self.left.pop(key, None)
        return True

    def _refuse(self, key: str, rule: str, found: object) -> NoReturn:
        raise PlanError(f"{self.place}: {key} must be {rule}, got {found!r}. {_REMEDY}")


def _is_natural(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_natural, value))
