"""Checkpoints whose layers have different numbers of experts, or smaller ones.

Transformers builds every layer with the same number of whole experts, so such a checkpoint
carries `edgemoe.json`, which says how many each layer really has, how wide they are where
config.json cannot say it, of which ranks where they are factored, and of which rank the bases
are that they share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError
from edgemoe.models.adapter import view_layers
from edgemoe.models.config.ragged_note import FILE_NAME, RaggedNote, read_ragged_note
from edgemoe.models.layers.factored import empty_factors, factor_layer
from edgemoe.models.layers.shared_basis import empty_bases, to_shared_basis
from edgemoe.models.layers.width import empty_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.models.discovery import ModelSpec
    from edgemoe.models.registry import Family

__all__ = ["FILE_NAME", "RaggedNote", "make_ragged_class", "read_ragged_note", "resize_layers"]


def make_ragged_class(family: Family, note: RaggedNote, spec: ModelSpec) -> type[Any]:
    """Derive the family's language model with the right number of experts in each layer.

    Transformers then loads the weights by its own conversion rules, into these shapes.

    Args:
        family: The family.
        note: What `edgemoe.json` says.
        spec: How its layers are built.

    Returns:
        A subclass; set an instance's class back to the base once it is loaded.
    """
    base = family.causal_lm

    def build(
        self: PreTrainedModel, config: PreTrainedConfig, *args: Any, **kwargs: Any
    ) -> None:
        base.__init__(self, config, *args, **kwargs)
        resize_layers(self, spec, note)

    return type(base.__name__, (base,), {"__init__": build, "__module__": base.__module__})


def resize_layers(model: PreTrainedModel, spec: ModelSpec, note: RaggedNote) -> None:
    """Allocate each MoE layer's experts; their contents are undefined.

    Args:
        model: A model that is being built.
        spec: How its layers are built.
        note: What `edgemoe.json` says.

    Raises:
        CheckpointError: The model has other MoE layers.
    """
    layers = view_layers(model, spec)
    moe_layers, counts = note.moe_layers, note.experts_per_layer
    if [layer.index for layer in layers] != list(moe_layers) or len(counts) != len(layers):
        raise CheckpointError(
            f"{FILE_NAME} must describe the MoE layers {[layer.index for layer in layers]}, "
            f"got {len(counts)} counts for {list(moe_layers)}. Apply the plan again."
        )
    for layer, count in zip(layers, counts, strict=True):
        # The contents come from the checkpoint; the first expert stands for all until then.
        layer.keep([0] * count)
    for layer, width in zip(layers, note.widths_per_layer or (), strict=False):
        if width != layer.intermediate_size:
            layer.replace(empty_tensors(layer, width))
    for layer, ranks in zip(layers, note.ranks_per_layer or (), strict=False):
        if ranks is not None:
            factor_layer(layer, empty_factors(layer, ranks))
    for layer, rank in zip(layers, note.basis_per_layer or (), strict=False):
        if rank is not None:
            to_shared_basis(layer, empty_bases(layer, rank))
