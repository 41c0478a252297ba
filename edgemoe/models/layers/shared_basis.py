"""Let the experts of an MoE layer work between shared bases, for good or for a while.

What such an experts module computes: `edgemoe.models.shared_basis_experts`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from torch import nn

from edgemoe.errors import CheckpointError
from edgemoe.models.experts import restored
from edgemoe.models.shared_basis_experts import INPUT_BASIS, OUTPUT_BASIS, based_class
from edgemoe.models.transformers_internals import mark_initialised

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch

    from edgemoe.models.layers.layer import MoeLayer


def to_shared_basis(layer: MoeLayer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put bases, and experts between them, in the place of a layer's; the router stays.

    Args:
        layer: The layer; its `spec` hold as before.
        tensors: `input_basis` [R, H] and `output_basis` [H, R] with R in [1, H], and what
            `based_names` lists, as the family stores it, with R in the place of H.

    Raises:
        CheckpointError: The tensors do not fit together or do not fit the layer, or the layer
            is factored or shares bases already.
    """
    if layer.is_factored or layer.is_based:
        raise CheckpointError(
            f"{layer.name} must have experts of the full hidden size to get shared bases, got "
            f"{'factored ones' if layer.is_factored else 'bases already'}. Start from the "
            "checkpoint that it was made from."
        )
    hidden = layer.hidden_size
    found = tensors.get(INPUT_BASIS)
    rank = 0 if found is None or found.ndim != 2 else int(found.shape[0])
    if not 1 <= rank <= hidden:
        raise CheckpointError(
            f"{layer.name}: the rank of shared bases must be in [1, {hidden}], the hidden "
            f"size, got {rank}. Choose another."
        )
    for name, shape in _shapes(layer, rank).items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{layer.name}: {name} must have the shape {shape}, got "
                f"{None if tensor is None else tuple(tensor.shape)}."
            )
    experts: Any = layer.experts
    for name in (INPUT_BASIS, OUTPUT_BASIS, *based_names(layer)):
        if hasattr(experts, name):
            delattr(experts, name)
        experts.register_parameter(name, nn.Parameter(tensors[name], requires_grad=False))
    # transformers would initialise what is not there, and check_fit sees what is missing.
    mark_initialised(experts)
    family_class: Any = type(experts)
    experts.__class__ = based_class(family_class)


@contextlib.contextmanager
def based(layer: MoeLayer, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put bases, and experts between them, in the place of a layer's for a while.

    Args:
        layer: The layer.
        tensors: What `to_shared_basis` takes.

    Yields:
        Nothing. When the block ends the layer is as it was.

    Raises:
        CheckpointError: As `to_shared_basis`.
    """
    with restored(layer.experts):
        to_shared_basis(layer, tensors)
        yield


def based_names(layer: MoeLayer) -> tuple[str, ...]:
    """Name the attributes of an experts module that get another shape between bases."""
    names = (layer.layout.gate_up_name, "down_proj")
    return (*names, "down_proj_bias") if layer.layout.has_bias else names


def empty_bases(layer: MoeLayer, rank: int) -> dict[str, torch.Tensor]:
    """Allocate what `to_shared_basis` takes, on the device and in the type of a layer.

    Args:
        layer: A layer without bases.
        rank: R, in [1, hidden_size].

    Returns:
        Tensors without contents.
    """
    like = layer.tensor(f"{layer.spec.experts}.down_proj")
    return {name: like.new_empty(shape) for name, shape in _shapes(layer, rank).items()}


def _shapes(layer: MoeLayer, rank: int) -> dict[str, tuple[int, ...]]:
    count, hidden, units = layer.num_experts, layer.hidden_size, layer.intermediate_size
    layout = layer.layout
    first, second = (count, units * (2 if layout.has_gate else 1), rank), (count, rank, units)
    if layout.is_transposed:
        first, second = (count, *first[:0:-1]), (count, *second[:0:-1])
    shapes = {
        INPUT_BASIS: (rank, hidden),
        OUTPUT_BASIS: (hidden, rank),
        layout.gate_up_name: first,
        "down_proj": second,
        "down_proj_bias": (count, rank),
    }
    return {name: shapes[name] for name in (INPUT_BASIS, OUTPUT_BASIS, *based_names(layer))}
