"""The header of a statistics file: types and ranges of everything that is computed with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Mapping

# Least value of each number of a layer's shape.
_LAYER: dict[str, int] = {
    "layer": 0,
    "num_experts": 1,
    "top_k": 1,
    "n_group": 1,
    "min_group_size": 1,
    "intermediate_size": 1,
}
_PASS: dict[str, int] = {"lines": 0, "tokens": 0, "sequence_length": 1, "max_tokens": 1}
_NULLABLE = frozenset({"intermediate_size", "max_tokens"})


def check_header(header: Mapping[str, Any]) -> None:
    """Refuse a header with a value of another type, or out of its range.

    Args:
        header: The JSON object.

    Raises:
        ValueError: A value is refused; the message names it.
        TypeError: A name is no string.
    """
    shape = header["shape"]
    _check_numbers("shape", shape, {"hidden_size": 1, "intermediate_size": 1})
    _check_text("shape.family", shape["family"])
    for place, layer in enumerate(shape["layers"]):
        _check_numbers(f"shape.layers[{place}]", layer, _LAYER)
    for name, passes in header["tasks"].items():
        for place, one in enumerate(passes):
            where = f"tasks.{quote(name, 80)}[{place}]"
            _check_numbers(where, one, _PASS)
            _check_text(f"{where}.sha256", one["sha256"])
            shard = one["shard"]
            if not (
                isinstance(shard, list)
                and len(shard) == 2
                and all(type(number) is int for number in shard)
                and 0 <= shard[0] < shard[1]
            ):
                raise ValueError(
                    f"{where}.shard must be [index, of] with index < of, got {quote(shard, 80)}"
                )


def _check_text(where: str, found: object) -> None:
    if not isinstance(found, str):
        raise TypeError(f"{where} must be a string, got {quote(found, 80)}")


def _check_numbers(where: str, found: Mapping[str, Any], least: Mapping[str, int]) -> None:
    for name, bound in least.items():
        value = found.get(name, bound)
        if value is None and name in _NULLABLE:
            continue
        if type(value) is not int or value < bound:
            raise ValueError(
                f"{where}.{name} must be an integer in [{bound}, inf), got {quote(value, 80)}"
            )
