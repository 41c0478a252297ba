"""fixed: every token uses as many experts, in each layer as many as a table says.

Without a table it is two thirds of the router's own number, rounded up::

    k = ceil(2 K / 3)

which kept 98.8% of the scores of nine models without any training ("An Empirical Study on
Expert Pruning", https://arxiv.org/abs/2609.25809).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.allocate.budget import spend_evenly, two_thirds
from edgemoe.errors import AllocationError
from edgemoe.k_rule import KRule
from edgemoe.models.k_policy import most_slots

if TYPE_CHECKING:
    from edgemoe.oracle.oracle import LayerOracle


def fixed(
    oracle: LayerOracle, mean_k: float | None, seed: int, *, k: str = ""
) -> tuple[KRule, ...]:
    """Use the same number of experts for every token.

    Args:
        oracle: The model; it is not run.
        mean_k: Experts per token and layer, in [1, inf); layers from the first on get one more
            where it is no integer. None for two thirds of each layer's own number.
        seed: Not used.
        k: A number for all layers, or one for each, with commas; instead of `mean_k`.

    Returns:
        A rule for each MoE layer.

    Raises:
        AllocationError: The table is malformed, or both are given.
    """
    del seed
    layers = oracle.moe.layers
    if k and mean_k is not None:
        raise AllocationError(
            f"fixed must have a table or a mean, got k={k} and {mean_k:g}. Leave one out."
        )
    if k:
        counts = _read_table(k, len(layers))
    elif mean_k is None:
        counts = [two_thirds(layer) for layer in layers]
    else:
        counts = spend_evenly(mean_k, [most_slots(layer) for layer in layers])
    return tuple(KRule(slots=count) for count in counts)


def _read_table(text: str, layers: int) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise AllocationError(
            f"k must be integers in [1, inf) with commas between, got {text!r}. Correct it."
        )
    counts = [int(part) for part in parts]
    if len(counts) == 1:
        counts *= layers
    if len(counts) != layers:
        raise AllocationError(
            f"k must have one number for all, or one for each of the {layers} MoE layers, got "
            f"{len(counts)}. Correct it."
        )
    return counts
