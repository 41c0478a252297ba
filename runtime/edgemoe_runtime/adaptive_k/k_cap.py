"""The cap of experts per token, one value per MoE layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_runtime.bundle.manifest import Manifest


def check_k_cap(
    k_cap: int | Sequence[int] | None, *, top_k: int, layers: int
) -> tuple[int, ...]:
    """Return the cap for every MoE layer.

    Args:
        k_cap: one cap for all layers, one per layer, or None for the full top_k.
        top_k: experts per token that the graph has.
        layers: number of MoE layers.

    Raises:
        RequestError: when a value is outside [1, top_k] or their number is wrong.
    """
    if k_cap is None:
        return (top_k,) * layers
    given: Any = k_cap  # numpy's integers and arrays as well
    values: tuple[int, ...]
    if hasattr(given, "__len__"):
        values = tuple(given)
        if len(values) != layers:
            raise RequestError(
                f"k_cap must have one value per MoE layer ({layers}), got {len(values)}. Pass"
                " one number to use it in all layers."
            )
    else:
        values = (given,) * max(layers, 1)
    for value in values:
        # numpy integers are fine, booleans and floats are mistakes
        whole = hasattr(value, "__index__") and not isinstance(value, bool)
        if not whole or not 1 <= value <= top_k:
            raise RequestError(
                f"k_cap must be a whole number in [1, {top_k}] (top_k of this task), got"
                f" {value!r}. Leave it out for the full k."
            )
    return tuple(int(value) for value in values[:layers])


def experts_per_token(k_cap: Sequence[int], top_k: int) -> float:
    """Return the experts that a token runs through per MoE layer, averaged over layers."""
    if not k_cap:
        return 0.0
    return sum(min(top_k, cap) for cap in k_cap) / len(k_cap)


def ladder_position(manifest: Manifest, task: str, k_cap: Sequence[int]) -> str | None:
    """Return the name of the rung with these caps on a task's ladder, or None."""
    for rung in manifest.ladder(task):
        if rung.k_cap == tuple(k_cap):
            return rung.name
    return None


def compact(k_cap: Sequence[int]) -> int | list[int]:
    """Return one number where all layers have the same cap, else the list."""
    if k_cap and len(set(k_cap)) == 1:
        return k_cap[0]
    return list(k_cap)
