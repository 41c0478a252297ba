"""What of an MoE layer depends on how many intermediate neurons its experts have."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from torch import nn

    from edgemoe.models.expert_tensors import ExpertTensor
    from edgemoe.models.layer import MoeLayer

# What families call the width on their experts modules; some kernels ask for it.
_ATTRIBUTES = ("intermediate_dim", "intermediate_size", "ffn_dim", "expert_dim")


def width_axis(layer: MoeLayer, name: str) -> int | None:
    """Tell which axis of a tensor has neurons, where they may become more or fewer.

    Args:
        layer: The layer.
        name: A tensor, from the block on.

    Returns:
        The axis; None for a tensor without neurons, and where the layer is factored.
    """
    part = name.removeprefix(f"{layer.facts.experts}.")
    is_fixed = layer.is_factored or part not in layer.layout.names
    return None if is_fixed else layer.layout.width_axis(part)


def width_in(layer: MoeLayer, tensors: Mapping[str, torch.Tensor]) -> int:
    """Tell how wide the experts are that a layer is about to get.

    Args:
        layer: The layer.
        tensors: What :meth:`edgemoe.models.layer.MoeLayer.replace` takes.

    Returns:
        Their intermediate neurons; those of the layer where the tensors do not tell.
    """
    axis = width_axis(layer, layer.counting)
    given = tensors[layer.counting]
    if axis is None or given.ndim <= axis:
        return layer.intermediate_size
    return int(given.shape[axis])


def follow_width(experts: nn.Module, before: int, after: int) -> None:
    """Let an experts module's own numbers follow its width.

    Args:
        experts: The module.
        before: Its width as the numbers say it.
        after: Its width as the tensors have it.
    """
    for name in _ATTRIBUTES:
        if vars(experts).get(name) == before:
            setattr(experts, name, after)


def neuron_outputs(layer: MoeLayer, expert: int) -> torch.Tensor:
    """Return what each neuron of an expert adds to its output, where the neuron gives 1.

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
    """Tell what shapes the tensors with neurons would have, were the experts of a width.

    Args:
        layer: The layer.
        width: Intermediate neurons of each expert, in [1, inf).

    Returns:
        Shapes by the tensors' names; none where the layer is factored.
    """
    shapes = {}
    for name, tensor in layer.tensors().items():
        axis = width_axis(layer, name)
        if axis is not None:
            shape = list(tensor.shape)
            shape[axis] = shape[axis] // layer.intermediate_size * width
            shapes[name] = tuple(shape)
    return shapes


def empty_tensors(layer: MoeLayer, width: int) -> dict[str, torch.Tensor]:
    """Make room for experts of another width.

    Args:
        layer: A layer that is not factored.
        width: Intermediate neurons of each expert, in [1, inf).

    Returns:
        What :meth:`edgemoe.models.layer.MoeLayer.replace` takes; tensors that depend on the
        width have no contents.
    """
    tensors = layer.tensors()
    for name, shape in widened_shapes(layer, width).items():
        tensors[name] = tensors[name].new_empty(shape)
    return tensors


def entry_size(layer: MoeLayer, spec: ExpertTensor, width: int) -> int:
    """Tell how many numbers one expert has in a tensor, were it of another width.

    Args:
        layer: The layer.
        spec: Which tensor; it holds no ids.
        width: Intermediate neurons of the expert.

    Returns:
        Their number.
    """
    tensor = layer.tensor(spec.name)
    entry = tensor.numel() // tensor.shape[spec.axis]
    has_neurons = width_axis(layer, spec.name) is not None
    return entry // layer.intermediate_size * width if has_neurons else entry
