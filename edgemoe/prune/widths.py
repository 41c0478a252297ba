"""How many channels the experts of each layer keep, and which.

Kernels like widths that are multiples of 8, so a layer's experts keep a multiple of 8 channels,
or all. What a fraction leaves beyond multiples of 8 goes, in steps of 8, to the layers where a
step is nearest to what they should have: highest averages (D'Hondt), no layer more than a step
below or above its due, and the total never above the fraction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import PlanError
from edgemoe.plans.channels import write_mask
from edgemoe.plans.layer_plan import WIDTH_MULTIPLE, LayerPlan, MergedExpert

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.models.shapes import ModelShape

WIDTHS = ("equal", "ragged")
# Products of a fraction and whole numbers are off by less.
_ROUNDING = 1e-6


def count_widths(shape: ModelShape, keep: float) -> tuple[int, ...]:
    """Turn a fraction of the channels into a width per MoE layer.

    Args:
        shape: The model.
        keep: Fraction of all routed experts' channels, in (0, 1].

    Returns:
        Intermediate channels of each expert, one number per MoE layer: multiples of 8 or all,
        and together at most the fraction.

    Raises:
        PlanError: The fraction is out of range, or below 8 channels in every expert.
    """
    if not 0 < keep <= 1:
        raise PlanError(f"--keep must be a fraction of the neurons in (0, 1], got {keep}.")
    sizes, experts = shape.widths_per_layer, shape.experts_per_layer
    least = sum(e * min(size, WIDTH_MULTIPLE) for e, size in zip(experts, sizes, strict=True))
    whole = sum(e * size for e, size in zip(experts, sizes, strict=True))
    if keep * whole < least - _ROUNDING:
        raise PlanError(
            f"--keep must leave {WIDTH_MULTIPLE} neurons in every expert, which are "
            f"{least / whole:.3g} of them here, got {keep}. Keep more, or drop experts."
        )
    return share_widths([keep * size for size in sizes], sizes, experts)


def share_widths(
    wanted: Sequence[float], sizes: Sequence[int], experts: Sequence[int]
) -> tuple[int, ...]:
    """Round widths to multiples of 8 so that they take no more than they should together.

    Args:
        wanted: Intermediate channels that an expert of each layer should have, in [0, its
            size].
        sizes: Intermediate channels that it has.
        experts: Experts of each layer.

    Returns:
        Widths in [min(8, size), size], multiples of 8 or the size; together, counted over all
        experts, at most what was wanted, unless 8 for each are more than that.
    """
    layers = range(len(wanted))
    least = [min(size, WIDTH_MULTIPLE) for size in sizes]
    widths = [
        size if want > size - _ROUNDING else max(low, _below(want))
        for want, size, low in zip(wanted, sizes, least, strict=True)
    ]
    left = sum((wanted[n] - widths[n]) * experts[n] for n in layers) + _ROUNDING
    while left < 0 and any(widths[n] > least[n] for n in layers):
        # Where 8 were more than a layer should have, others pay for it.
        n = min(
            (n for n in layers if widths[n] > least[n]),
            key=lambda n: (wanted[n] / widths[n], -n),
        )
        lower = _below(widths[n] - 1)
        left += (widths[n] - lower) * experts[n]
        widths[n] = lower
    while True:
        above = [min(sizes[n], widths[n] + WIDTH_MULTIPLE) for n in layers]
        costs = [(above[n] - widths[n]) * experts[n] for n in layers]
        short = [n for n in layers if widths[n] < wanted[n] - _ROUNDING and costs[n] <= left]
        if not short:
            return tuple(widths)
        n = max(short, key=lambda n: (wanted[n] / above[n], -n))
        left -= costs[n]
        widths[n] = above[n]


def check_widths(shape: ModelShape, widths: Sequence[int]) -> tuple[int, ...]:
    """Refuse widths that no plan could have.

    Args:
        shape: The model.
        widths: Intermediate channels of each expert per MoE layer.

    Returns:
        The widths.

    Raises:
        PlanError: There is not one per layer, or one that its experts cannot have.
    """
    sizes = shape.widths_per_layer
    if len(widths) != len(sizes):
        raise PlanError(
            f"there must be one width for each of the {len(sizes)} MoE layers, got "
            f"{len(widths)}: {list(widths)}. Give one per layer."
        )
    for width, size, layer in zip(widths, sizes, shape.layers, strict=True):
        if not 1 <= width <= size:
            raise PlanError(
                f"layer {layer.layer} must keep neurons in [1, {size}] of each expert, got "
                f"{width}. Choose another width."
            )
    return tuple(widths)


def check_choice(widths: str) -> None:
    """Refuse a value of the option `widths` that there is not.

    Args:
        widths: The value.

    Raises:
        PlanError: It is none of `WIDTHS`.
    """
    if widths not in WIDTHS:
        raise PlanError(f"widths must be {' or '.join(WIDTHS)}, got {widths!r}.")


def keep_equal(layer: int, scores: NDArray[np.float64], width: int) -> LayerPlan:
    """Keep as many channels of every expert: those of the highest scores.

    Args:
        layer: Index of the decoder layer.
        scores: Of every expert's channels, float64 [experts, channels].
        width: How many to keep of each expert.

    Returns:
        The layer's plan. Of channels with equal scores those of lower number stay.
    """
    order = np.argsort(-scores, axis=1, kind="stable")
    return _plan(layer, scores.shape, [row[:width].tolist() for row in order])


def keep_ragged(layer: int, scores: NDArray[np.float64], total: int) -> LayerPlan:
    """Keep the channels of the highest scores of a layer, and one of every expert.

    Args:
        layer: Index of the decoder layer.
        scores: Of every expert's channels, float64 [experts, channels].
        total: How many to keep of all experts together, at least one for each.

    Returns:
        The layer's plan.
    """
    experts, size = scores.shape
    best = scores.argmax(axis=1)
    first = [(expert * size + int(neuron)) for expert, neuron in enumerate(best)]
    order = np.argsort(-scores.reshape(-1), kind="stable").tolist()
    taken = set(first)
    rest = [place for place in order if place not in taken]
    kept: list[list[int]] = [[] for _ in range(experts)]
    for place in [*first, *rest[: max(0, total - experts)]]:
        kept[place // size].append(place % size)
    return _plan(layer, scores.shape, kept)


def _plan(layer: int, shape: tuple[int, ...], kept: Sequence[Sequence[int]]) -> LayerPlan:
    size = shape[1]
    return LayerPlan(
        layer=layer,
        experts=tuple(
            MergedExpert(
                members=(expert,),
                neurons=None if len(neurons) == size else write_mask(neurons, size),
            )
            for expert, neurons in enumerate(kept)
        ),
    )


def _below(width: float) -> int:
    return int((width + _ROUNDING) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE
