"""Find the MoE layers of a transformers model: asked of the contract, never guessed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models.contract import MoeLayer, MoeModel
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from edgemoe.models.registry import Family


def adapt_model(
    model: PreTrainedModel, path: Path | None = None, stored_dtype: torch.dtype | None = None
) -> MoeModel:
    """View a transformers model as the kit does; it is put in eval mode, without gradients.

    Args:
        model: A language model of a supported family.
        path: The checkpoint that its weights equal, if any.
        stored_dtype: Floating type to store it in; that of the model by default.

    Returns:
        The view.

    Raises:
        FamilyError: The family is not supported, or breaks the experts contract.
        CheckpointError: The model has no MoE layer, or one with fewer experts than top_k.
    """
    family = find_family(model.config.model_type)
    model.eval()
    model.requires_grad_(False)
    note = getattr(model.config, "edgemoe", None)
    return MoeModel(
        model=model,
        config=model.config,
        family=family.model_type,
        layers=find_layers(model, family),
        path=path,
        stored_dtype=stored_dtype or model.dtype,
        provenance=note.get("provenance") if isinstance(note, dict) else None,
    )


def find_layers(model: PreTrainedModel, family: Family) -> list[MoeLayer]:
    """List the MoE layers of a model; dense decoder layers are left out.

    Args:
        model: A language model, possibly on the meta device.
        family: Its family.

    Returns:
        Views of its MoE layers, in order.

    Raises:
        FamilyError: An experts module breaks the contract.
        CheckpointError: There is no MoE layer, or one with fewer experts than top_k.
    """
    block_class = family.load_class(family.block)
    names = {id(module): name for name, module in model.named_modules()}
    layers = [
        _view(model, family, index, names[id(module)], module)
        for index, decoder_layer in enumerate(model.get_decoder().layers)
        for module in decoder_layer.modules()
        if isinstance(module, block_class)
    ]
    claimed = {id(layer.experts) for layer in layers}
    for name, module in model.named_modules():
        if is_experts_module(module) and id(module) not in claimed:
            raise FamilyError(
                f"every experts module must be inside a {family.block}, got {name}. This "
                f"transformers version changed {family.model_type}; install a tested one."
            )
    if not layers:
        raise CheckpointError(
            f"a {family.model_type} checkpoint must have an MoE layer, got none. Check the "
            "entries of config.json that make layers dense."
        )
    for layer in layers:
        if layer.top_k < 1 or layer.num_experts % layer.rule.n_group:
            raise CheckpointError(
                f"layer {layer.index} must use 1 or more experts per token and have equal "
                f"groups, got num_experts_per_tok={layer.top_k} and {layer.num_experts} "
                f"experts in {layer.rule.n_group} groups. Correct config.json."
            )
        if layer.num_experts < layer.top_k:
            raise CheckpointError(
                f"layer {layer.index} must have at least num_experts_per_tok={layer.top_k} "
                f"experts, got {layer.num_experts}. Correct config.json."
            )
    return layers


def is_experts_module(module: nn.Module) -> bool:
    """Ask whether a module was decorated with ``use_experts_implementation``.

    Args:
        module: Any module.

    Returns:
        Whether it keeps the experts contract.
    """
    # The decorator leaves these two on the class and on the instance.
    return hasattr(type(module), "_apply_gate") and "is_concatenated" in vars(module)


def _view(
    model: PreTrainedModel, family: Family, index: int, name: str, block: nn.Module
) -> MoeLayer:
    config = model.config
    experts = [child for child in block.children() if is_experts_module(child)]
    router_class = family.load_class(family.router)
    routers = [child for child in block.children() if isinstance(child, router_class)]
    if len(experts) != 1 or len(routers) != 1:
        raise FamilyError(
            f"{name} must have one experts module and one {family.router}, got {len(experts)} "
            f"and {len(routers)}. Install a transformers version that edgemoe is tested with."
        )
    _check_layout(name, experts[0])
    shared = (getattr(block, attribute) for attribute in family.shared)
    return MoeLayer(
        index=index,
        name=name,
        block=block,
        router=routers[0],
        experts=experts[0],
        rule=family.rule(config),
        top_k=int(config.num_experts_per_tok),
        activation=str(config.hidden_act),
        shared_parameters=sum(p.numel() for module in shared for p in module.parameters()),
        bias_name=family.bias,
    )


def _check_layout(name: str, experts: nn.Module) -> None:
    """Refuse the layouts that the rest of the kit would misread."""
    expected = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "is_concatenated": True,
        "has_post_expert_norm": False,
    }
    found = {key: getattr(experts, key) for key in expected}
    if found != expected:
        different = {key: value for key, value in found.items() if value != expected[key]}
        raise FamilyError(
            f"{name}: experts must be gated, concatenated, without bias and not transposed, "
            f"got {different}. This layout is not supported yet."
        )
