"""Give an MoE layer factored experts, for good or for a while.

What a factored experts module computes: `edgemoe.models.factored_experts`.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import CheckpointError
from edgemoe.models.expert_tensors import ExpertTensor
from edgemoe.models.experts import restored
from edgemoe.models.factored_experts import FACTOR_NAMES, factored_class, is_factored
from edgemoe.models.shapes import Ranks
from edgemoe.models.transformers_internals import mark_initialised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgemoe.models.discovery import LayerSpec
    from edgemoe.models.layers.layer import MoeLayer


def ranks_of(layer: MoeLayer) -> Ranks | None:
    """Return a layer's ranks; None where it is not factored."""
    if not is_factored(layer.experts):
        return None
    experts: Any = layer.experts
    return Ranks(int(experts.up_in.shape[1]), int(experts.down_in.shape[1]))


def product_shapes(layer: MoeLayer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of an expert's two matrices.

    Args:
        layer: Any layer.

    Returns:
        Rows (outputs) and columns (inputs) of the first product, whose rows are gate and up
        together where there is a gate, and of the second.
    """
    hidden, units = layer.hidden_size, layer.intermediate_size
    return (units * (2 if layer.layout.has_gate else 1), hidden), (hidden, units)


def factor_layer(layer: MoeLayer, factors: Mapping[str, torch.Tensor]) -> None:
    """Put factors in the place of a layer's weights; the router stays as it is.

    Args:
        layer: The layer; from now on its tensors are the factors.
        factors: All of `FACTOR_NAMES`, as the module says.

    Raises:
        CheckpointError: The factors do not fit together or do not fit the layer.
    """
    if layer.is_factored or layer.is_based:
        raise CheckpointError(
            f"{layer.name} must have whole experts to be factored, got "
            f"{'factored ones' if layer.is_factored else 'some between shared bases'}. Start "
            "from the checkpoint that it was made from."
        )
    experts: Any = layer.experts
    ranks = Ranks(*(factors[name].shape[1] for name in ("up_in", "down_in")))
    for name, shape in _shapes(layer, ranks).items():
        if tuple(factors[name].shape) != shape:
            raise CheckpointError(
                f"{layer.name}: {name} must have the shape {shape}, got "
                f"{tuple(factors[name].shape)}."
            )
    for name in (layer.layout.gate_up_name, "down_proj"):
        delattr(experts, name)
    for name in FACTOR_NAMES:
        experts.register_parameter(name, nn.Parameter(factors[name], requires_grad=False))
    # transformers would initialise what is not there, and check_fit sees what is missing.
    mark_initialised(experts)
    family_class: Any = type(experts)
    experts.__class__ = factored_class(family_class)
    layer.spec = factored_spec(layer.spec)


@contextlib.contextmanager
def factored(layer: MoeLayer, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put factors in the place of a layer's weights for a while.

    Args:
        layer: The layer.
        factors: What `factor_layer` takes.

    Yields:
        Nothing. When the block ends the layer is as it was.

    Raises:
        CheckpointError: As `factor_layer`.
    """
    spec = layer.spec
    with restored(layer.experts):
        factor_layer(layer, factors)
        try:
            yield
        finally:
            layer.spec = spec


def split_by_svd(layer: MoeLayer, rank: int) -> dict[str, torch.Tensor]:
    """Factor each expert's two products by truncated singular value decomposition.

    Args:
        layer: A layer that is not factored.
        rank: Largest rank of both products, in [1, inf).

    Returns:
        What `factor_layer` takes; the nearest factors of that rank in Frobenius norm
        (Eckart and Young), singular values shared evenly between both.
    """
    prefix, layout = layer.spec.experts, layer.layout
    found = {}
    for part, name in (("up", layout.gate_up_name), ("down", "down_proj")):
        weight = layer.tensor(f"{prefix}.{name}")
        if layout.is_transposed:
            weight = weight.transpose(1, 2)
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        kept = min(rank, values.shape[1])
        roots = values[:, :kept].sqrt()
        found[f"{part}_in"] = (roots[:, :, None] * right[:, :kept]).to(weight.dtype)
        found[f"{part}_out"] = (left[:, :, :kept] * roots[:, None, :]).to(weight.dtype)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def factored_spec(spec: LayerSpec) -> LayerSpec:
    """Return the structure of a layer once it is factored."""
    weights = {f"{spec.experts}.{name}" for name in spec.layout.names[:2]}
    kept = [tensor for tensor in spec.tensors if tensor.name not in weights]
    factors = [ExpertTensor(name=f"{spec.experts}.{name}") for name in FACTOR_NAMES]
    return replace(spec, tensors=(*factors, *kept))


def empty_factors(layer: MoeLayer, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Allocate a layer's factors, on the device and in the type of its weights."""
    like = layer.tensor(f"{layer.spec.experts}.down_proj")
    return {name: like.new_empty(shape) for name, shape in _shapes(layer, ranks).items()}


def _shapes(layer: MoeLayer, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    count = layer.num_experts
    (up_rows, up_columns), (down_rows, down_columns) = product_shapes(layer)
    return {
        "up_in": (count, ranks.up, up_columns),
        "up_out": (count, up_rows, ranks.up),
        "down_in": (count, ranks.down, down_columns),
        "down_out": (count, down_rows, ranks.down),
    }
