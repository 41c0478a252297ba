"""How many experts each token uses in a whole model, as plans and checkpoints say it."""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from edgemoe.errors import CheckpointError
from edgemoe.k_rule import KRule

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

_NUMBER = np.dtype("<f4")
_REMEDY = "Make it again with `edgemoe allocate`."
_ENTRIES = {"policy", "layers", "provenance"}
_LAYER_ENTRIES = {"layer", "k", "top_p", "allocator", "needs"}


@dataclass(frozen=True, kw_only=True, eq=False)
class KPolicy:
    """A rule for every MoE layer, and where the rules come from.

    Attributes:
        name: Name of the policy: `fixed`, `alloc-l`, `top-p`, `ada-k` or `fisher`.
        layers: Indices of the decoder layers with experts, ascending.
        rules: One for each of them.
        provenance: Task, options, seed and hashes; JSON values.
    """

    name: str
    layers: tuple[int, ...]
    rules: tuple[KRule, ...]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, KPolicy) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash((self.name, self.layers))

    def to_json(self) -> dict[str, Any]:
        """Return all entries as JSON values."""
        return {
            "policy": self.name,
            "provenance": dict(sorted(self.provenance.items())),
            "layers": [
                {"layer": layer, **_write_rule(rule)}
                for layer, rule in zip(self.layers, self.rules, strict=True)
            ],
        }

    def describe(self) -> dict[str, Any]:
        """Return the policy as JSON values, without its tensors.

        Returns:
            JSON values: its name, the most experts of a token in each MoE layer, the shares of
            mass and the number of trained parameters where there are such, and where it comes
            from.
        """
        shares = [rule.top_p for rule in self.rules]
        trained = [rule.allocator for rule in self.rules if rule.allocator is not None]
        found: dict[str, Any] = {
            "policy": self.name,
            "most_k": [rule.slots for rule in self.rules],
        }
        if any(share is not None for share in shares):
            found["top_p"] = shares[0] if len(set(shares)) == 1 else shares
        if trained:
            found["allocator_parameters"] = sum(rows.size for rows in trained)
        return {**found, "provenance": dict(sorted(self.provenance.items()))}

    @classmethod
    def from_json(cls, content: Mapping[str, Any], source: str) -> KPolicy:
        """Read what `to_json` returned.

        Args:
            content: The JSON object.
            source: What messages call it.

        Returns:
            The policy.

        Raises:
            CheckpointError: An entry is missing, unknown, or of the wrong type.
        """
        layers = content.get("layers")
        if (
            set(content) != _ENTRIES
            or not isinstance(content["policy"], str)
            or not isinstance(content["provenance"], dict)
            or not isinstance(layers, list)
            or not layers
        ):
            raise CheckpointError(
                f"{source} must have {', '.join(sorted(_ENTRIES))} and nothing else, got "
                f"{sorted(content)}. {_REMEDY}"
            )
        rules = [_read_rule(entry, source) for entry in layers]
        indices = [index for index, _ in rules]
        if indices != sorted(set(indices)):
            raise CheckpointError(
                f"{source} must name its layers in ascending order, each once, got {indices}. "
                f"{_REMEDY}"
            )
        return cls(
            name=content["policy"],
            layers=tuple(indices),
            rules=tuple(rule for _, rule in rules),
            provenance=dict(content["provenance"]),
        )


def _write_rule(rule: KRule) -> dict[str, Any]:
    found: dict[str, Any] = {"k": rule.slots}
    if rule.top_p is not None:
        found["top_p"] = rule.top_p
    if rule.allocator is not None:
        numbers = rule.allocator.astype(_NUMBER)
        found["allocator"] = base64.b64encode(numbers.tobytes()).decode("ascii")
    if rule.needs is not None:
        found["needs"] = list(rule.needs)
    return found


def _read_rule(entry: Any, source: str) -> tuple[int, KRule]:
    if not isinstance(entry, dict) or set(entry) - _LAYER_ENTRIES:
        raise CheckpointError(
            f"{source}: a layer must have layer, k and perhaps top_p, allocator and needs, got "
            f"{entry!r:.80}. {_REMEDY}"
        )
    index, slots, top_p = entry.get("layer"), entry.get("k"), entry.get("top_p")
    if not (_is_integer(index, 0) and _is_integer(slots, 1)):
        raise CheckpointError(
            f"{source}: layer must be an integer in [0, inf) and k one in [1, inf), got "
            f"{index!r} and {slots!r}. {_REMEDY}"
        )
    if top_p is not None and (isinstance(top_p, bool) or not isinstance(top_p, int | float)):
        raise CheckpointError(
            f"{source}: top_p must be a number in (0, 1], got {top_p!r}. {_REMEDY}"
        )
    rule = KRule(
        slots=slots,
        top_p=None if top_p is None else float(top_p),
        allocator=_read_allocator(entry.get("allocator"), slots, source),
        needs=_read_needs(entry.get("needs"), slots, source),
    )
    return index, rule


def _read_needs(numbers: Any, slots: int, source: str) -> tuple[float, ...] | None:
    if numbers is None:
        return None
    if (
        not isinstance(numbers, list)
        or len(numbers) < slots
        or not all(isinstance(n, float | int) and math.isfinite(n) for n in numbers)
    ):
        raise CheckpointError(
            f"{source}: needs must be a finite number for each k up to {slots} or beyond, got "
            f"{numbers!r:.80}. {_REMEDY}"
        )
    return tuple(map(float, numbers))


def _read_allocator(text: Any, slots: int, source: str) -> NDArray[np.float32] | None:
    if text is None:
        return None
    try:
        numbers = np.frombuffer(base64.b64decode(text, validate=True), _NUMBER)
        rows = numbers.reshape(slots, -1).astype(np.float32)
    except (TypeError, ValueError, binascii.Error) as error:
        raise CheckpointError(
            f"{source}: allocator must be {slots} rows of float32 numbers in base64, got: "
            f"{error}. {_REMEDY}"
        ) from error
    if not np.isfinite(rows).all():
        raise CheckpointError(
            f"{source}: allocator must have finite numbers, got NaN or infinity. {_REMEDY}"
        )
    return rows


def _is_integer(value: object, least: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
