"""What an MoE layer would be like with experts of another width."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

    from edgemoe.models.expert_tensors import ExpertTensor
    from edgemoe.models.layers.layer import MoeLayer


def channel_outputs(layer: MoeLayer, expert: int) -> torch.Tensor:
    """Return what each channel of an expert adds to its output, where the channel gives 1.

    Args:
        layer: A layer that is not factored.
        expert: Which expert, in [0, num_experts).

    Returns:
        Columns of the second product, in the hidden size even between shared bases
        [hidden, intermediate].
    """
    down = layer.down[expert]
    return cast("torch.Tensor", layer.experts.output_basis) @ down if layer.is_based else down


def widened_shapes(layer: MoeLayer, width: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors with intermediate channels, were experts of a width.

    Args:
        layer: The layer.
        width: Intermediate channels of each expert, in [1, inf).

    Returns:
        Shapes by the tensors' names; none where the layer is factored.
    """
    shapes = {}
    for name, tensor in layer.tensors().items():
        axis = layer.width_axis(name)
        if axis is not None:
            shape = list(tensor.shape)
            shape[axis] = shape[axis] // layer.intermediate_size * width
            shapes[name] = tuple(shape)
    return shapes


def empty_tensors(layer: MoeLayer, width: int) -> dict[str, torch.Tensor]:
    """Allocate tensors for experts of another width.

    Args:
        layer: A layer that is not factored.
        width: Intermediate channels of each expert, in [1, inf).

    Returns:
        What `edgemoe.models.layers.layer.MoeLayer.replace` takes; tensors that depend on the
        width have no contents.
    """
    tensors = layer.tensors()
    for name, shape in widened_shapes(layer, width).items():
        tensors[name] = tensors[name].new_empty(shape)
    return tensors


def entry_size(layer: MoeLayer, spec: ExpertTensor, width: int) -> int:
    """Count the numbers that one expert has in a tensor, were it of another width.

    Args:
        layer: The layer.
        spec: Which tensor; it holds no ids.
        width: Intermediate channels of the expert.

    Returns:
        Their number.
    """
    tensor = layer.tensor(spec.name)
    entry = tensor.numel() // tensor.shape[spec.axis]
    has_neurons = layer.width_axis(spec.name) is not None
    return entry // layer.intermediate_size * width if has_neurons else entry
