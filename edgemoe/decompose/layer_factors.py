"""The factors of one layer, gathered expert by expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.models.factored_experts import stack_factors

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from edgemoe.decompose.truncation import Truncation
    from edgemoe.models.layers.layer import MoeLayer


@dataclass(frozen=True)
class LayerFactors:
    """Factors that a method computed for a layer.

    Attributes:
        tensors: What `edgemoe.models.layers.factored.factor_layer` takes.
        lost: What the first and the second products of all experts lose together: squared
            Frobenius norms, of what they give on the method's tokens or, without tokens, of
            themselves.
    """

    tensors: dict[str, torch.Tensor]
    lost: tuple[float, float]


def expert_matrices(layer: MoeLayer, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return an expert's two matrices, rows in the order of the family.

    Args:
        layer: A layer of whole experts.
        expert: Which.

    Returns:
        The first product's [2 * intermediate, hidden], or [intermediate, hidden] without a
        gate, and the second's [hidden, intermediate]; in the type of the layer.
    """
    prefix, layout = layer.spec.experts, layer.layout
    up, down = (
        layer.tensor(f"{prefix}.{name}")[expert] for name in (layout.gate_up_name, "down_proj")
    )
    return (up.T, down.T) if layout.is_transposed else (up, down)


def gather_factors(
    layer: MoeLayer, experts: Iterable[tuple[Truncation, Truncation]]
) -> LayerFactors:
    """Put the factors of all experts together, in the type of the layer.

    Args:
        layer: The layer.
        experts: Factors of both products, expert after expert.

    Returns:
        The layer's factors.
    """
    dtype = layer.tensor(f"{layer.spec.experts}.down_proj").dtype
    pairs: tuple[list[tuple[torch.Tensor, torch.Tensor]], ...] = ([], [])
    lost = [0.0, 0.0]
    for products in experts:
        for part, found in enumerate(products):
            # Cast at once: in float64 a layer would be several times its size.
            pairs[part].append((found.inner.to(dtype), found.outer.to(dtype)))
            lost[part] += found.lost
    (up_in, up_out), (down_in, down_out) = (stack_factors(found) for found in pairs)
    tensors = {"up_in": up_in, "up_out": up_out, "down_in": down_in, "down_out": down_out}
    return LayerFactors(tensors, (lost[0], lost[1]))
