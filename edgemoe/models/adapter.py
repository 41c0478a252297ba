"""View a transformers model as the kit does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError
from edgemoe.models.contract import MoeModel
from edgemoe.models.discovery import discover
from edgemoe.models.layers.factored import factored_spec
from edgemoe.models.layers.layer import MoeLayer
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from edgemoe.models.discovery import ModelSpec


def adapt_model(
    model: PreTrainedModel,
    path: Path | None = None,
    stored_dtype: torch.dtype | None = None,
    spec: ModelSpec | None = None,
) -> MoeModel:
    """View a transformers model as the kit does; it is put in eval mode, without gradients.

    Args:
        model: A language model with experts.
        path: The checkpoint that its weights equal, if any.
        stored_dtype: Floating type to store it in; that of the model by default.
        spec: How its layers are built; found out by default.

    Returns:
        The view.

    Raises:
        FamilyError: The family is not supported.
        CheckpointError: The model has no MoE layer, or one with fewer experts than top_k.
    """
    if spec is None:
        spec = discover(find_family(model.config.model_type), model.config)
    model.eval()
    model.requires_grad_(False)
    note = getattr(model.config, "edgemoe", None)
    return MoeModel(
        model=model,
        config=model.config,
        family=str(model.config.model_type),
        layers=view_layers(model, spec),
        path=path,
        stored_dtype=stored_dtype or model.dtype,
        provenance=note.get("provenance") if isinstance(note, dict) else None,
        count_entries=spec.count_entries,
    )


def view_layers(model: PreTrainedModel, spec: ModelSpec) -> list[MoeLayer]:
    """List the MoE layers of a model; dense decoder layers are left out.

    Args:
        model: A language model, possibly on the meta device.
        spec: How its layers are built.

    Returns:
        Views of its MoE layers, in order.

    Raises:
        CheckpointError: A layer has fewer experts than its router needs, or unequal groups.
    """
    layers = [
        MoeLayer(
            spec=layer,
            block=model.get_submodule(layer.block),
            count_entries=spec.count_entries,
        )
        for layer in spec.layers
    ]
    for layer in layers:
        if layer.is_factored:
            layer.spec = factored_spec(layer.spec)
        shape = layer.shape
        if layer.num_experts < shape.min_experts or layer.num_experts % shape.n_group:
            raise CheckpointError(
                f"layer {layer.index} must have at least {shape.least_kept} experts in "
                f"{shape.n_group} equal groups, because {shape.least_reason}, got "
                f"{layer.num_experts}. Correct config.json."
            )
    return layers
