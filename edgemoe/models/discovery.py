"""Find out how a family builds its MoE layers: by building them, never by guessing names.

Two skeletons without memory are built, the second with more experts. What differs between them
is what counts experts: entries of config.json, an axis of a tensor, a number on a module. The
router's rule, its tensors' roles and the activation are then found by asking the modules
(`edgemoe.models.routing.identification`, `edgemoe.models.activation`).
"""

from __future__ import annotations

import copy
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models.activation import find_activation
from edgemoe.models.expert_tensors import CountAttribute, ExpertTensor
from edgemoe.models.experts import ExpertsLayout, is_experts_module
from edgemoe.models.routing.identification import identify_router
from edgemoe.models.routing.probe import RouterProbe

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.models.activation import Activation
    from edgemoe.models.registry import Family
    from edgemoe.models.routing.identification import RouterSpec


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """Structure of one MoE layer.

    Attributes:
        index: Index of the decoder layer.
        block: Name of the MoE block in the model.
        experts: Attribute of the block that is the experts module.
        router: Attribute of the block that is the router.
        layout: How the experts module stores weights.
        activation: What experts do between their two products; None where unknown.
        tensors: Everything with one entry per expert, in the experts module and outside.
        counts: Numbers that must follow the number of experts.
        routing: What the router does.
        width: Intermediate channels that the configuration gives each expert.
    """

    index: int
    block: str
    experts: str
    router: str
    layout: ExpertsLayout
    activation: Activation | None
    tensors: tuple[ExpertTensor, ...]
    counts: tuple[CountAttribute, ...]
    routing: RouterSpec
    width: int


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Structure of a model's MoE layers.

    Attributes:
        count_entries: Entries of config.json that say how many experts a layer has.
        num_experts: How many the configuration says.
        layers: The MoE layers, in order.
    """

    count_entries: tuple[str, ...]
    num_experts: int
    layers: tuple[LayerSpec, ...]


_SCALARS = (int, float, str, bool)

_known: dict[tuple[str, str], ModelSpec] = {}


def discover(family: Family, config: PreTrainedConfig) -> ModelSpec:
    """Find out how a model's MoE layers are built; no weight is needed.

    Args:
        family: Its family.
        config: Its configuration.

    Returns:
        The structure; the same object for the same configuration.

    Raises:
        FamilyError: A layer is built in a way that edgemoe cannot change safely.
        CheckpointError: The configuration makes no MoE layer, or gives layers different
            numbers of experts.
    """
    text = config.to_json_string(use_diff=False)
    key = (family.causal_lm.__name__, hashlib.sha256(text.encode()).hexdigest())
    if key not in _known:
        _known[key] = _discover(family, config)
    return _known[key]


def build_skeleton(family: Family, config: PreTrainedConfig) -> PreTrainedModel:
    """Build a model that has shapes but no memory.

    Args:
        family: Its family.
        config: Its configuration; it is not changed.

    Returns:
        The model on the meta device, in eval mode.
    """
    with torch.device("meta"):
        model: PreTrainedModel = family.causal_lm(copy.deepcopy(config))
    return model.eval()


def _discover(family: Family, config: PreTrainedConfig) -> ModelSpec:
    skeleton = build_skeleton(family, config)
    found = _experts_modules(skeleton)
    if not found:
        raise CheckpointError(
            f"a {family.model_type} checkpoint must have an MoE layer, got none. Check the "
            "entries of config.json that make layers dense."
        )
    counts = {_count(module) for module in found.values()}
    if len(counts) > 1:
        raise CheckpointError(
            "config.json must give all layers the same number of experts, got "
            f"{sorted(counts)}. Different numbers belong into edgemoe.json, as `edgemoe "
            "apply` writes it."
        )
    experts = counts.pop()
    entries, larger = _enlarge(family, config, experts)
    tensors = _expert_tensors(skeleton, larger, experts)
    decoder = _decoder_layers(skeleton)
    asked: dict[str, RouterSpec] = {}
    layers = []
    for name, module in found.items():
        owner = next((index for prefix, index in decoder if name.startswith(prefix)), None)
        if owner is None:
            raise FamilyError(
                f"every experts module must be inside a decoder layer, got {name}. This way of "
                f"building {family.model_type} is not supported."
            )
        block_name, _, attribute = name.rpartition(".")
        block = skeleton.get_submodule(block_name)
        mine = _relative(tensors, block_name)
        counts_here = _counts(block, larger.get_submodule(block_name), experts)
        router = _router_of(mine, attribute, block_name)
        signature = _signature(block.get_submodule(router), mine)
        if signature not in asked:
            probe = RouterProbe(block, router, mine, counts_here, experts, config.hidden_size)
            jitter = float(getattr(config, "router_jitter_noise", None) or 0.0)
            asked[signature] = identify_router(probe, experts, jitter)
        layers.append(
            LayerSpec(
                index=owner,
                block=block_name,
                experts=attribute,
                router=router,
                layout=_layout(module, name),
                width=width_of(module),
                activation=find_activation(module),
                tensors=(*mine, *_id_tables(block, router)),
                counts=counts_here,
                routing=asked[signature],
            )
        )
    left = set(tensors) - {
        f"{layer.block}.{tensor.name}" for layer in layers for tensor in layer.tensors
    }
    if left:
        raise FamilyError(
            "only MoE blocks may have tensors with one entry per expert, got "
            f"{sorted(left)[0]}. This way of building {family.model_type} is not supported."
        )
    return ModelSpec(count_entries=entries, num_experts=experts, layers=tuple(layers))


def _experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if is_experts_module(module)}


def _count(experts: Any) -> int:
    down: torch.Tensor = experts.down_proj
    return int(down.shape[0])


def width_of(experts: Any) -> int:
    """Return the intermediate channels of each expert of a module.

    Args:
        experts: A module that keeps the experts contract and is not factored.

    Returns:
        Their number.
    """
    down: torch.Tensor = experts.down_proj
    return int(down.shape[1 if experts.is_transposed else 2])


def _layout(experts: nn.Module, name: str) -> ExpertsLayout:
    if experts.has_post_expert_norm:
        raise FamilyError(
            f"{name}: experts must not be normalised one by one, got has_post_expert_norm. "
            "This layout is not supported yet."
        )
    return ExpertsLayout.of(experts)


def _enlarge(
    family: Family, config: PreTrainedConfig, experts: int
) -> tuple[tuple[str, ...], PreTrainedModel]:
    """Find the entries that say how many experts there are, and build a model with more."""
    entries = [
        name
        for name, value in config.to_dict().items()
        if type(value) is int and value == experts
    ]
    # Some families repeat the number, and want all of its entries changed together.
    for chosen in (*((name,) for name in entries), tuple(entries)):
        larger = _try(family, config, chosen, 2 * experts)
        if larger is not None:
            return chosen, larger
    raise FamilyError(
        f"config.json must have an entry that says how many experts a layer has, got none of "
        f"value {experts} among {entries} that changes it. This way of building "
        f"{family.model_type} is not supported."
    )


def _try(
    family: Family, config: PreTrainedConfig, entries: tuple[str, ...], experts: int
) -> PreTrainedModel | None:
    changed = copy.deepcopy(config)
    try:
        for entry in entries:
            setattr(changed, entry, experts)
        model = build_skeleton(family, changed)
    except Exception:  # whatever a family raises where an entry means something else
        return None
    counts = {_count(module) for module in _experts_modules(model).values()}
    return model if counts == {experts} else None


def _expert_tensors(
    skeleton: nn.Module, larger: nn.Module, experts: int
) -> dict[str, ExpertTensor]:
    """Compare two skeletons, of which the second has twice as many experts."""
    sizes = {name: tensor.shape for name, tensor in _named_tensors(larger)}
    found = {}
    for name, tensor in _named_tensors(skeleton):
        other = sizes.get(name)
        if other is None or len(other) != tensor.ndim:
            raise FamilyError(f"{name} must not depend on the number of experts.")
        axes = [axis for axis in range(tensor.ndim) if tensor.shape[axis] != other[axis]]
        if not axes:
            continue
        axis, tail = axes[0], tensor.shape[axes[0]] - experts
        if len(axes) > 1 or other[axis] - tensor.shape[axis] != experts or tail < 0:
            raise FamilyError(
                f"{name} must have one entry per expert on one axis, got "
                f"{tuple(tensor.shape)} for {experts} experts and {tuple(other)} for "
                f"{2 * experts}."
            )
        found[name] = ExpertTensor(name=name, axis=axis, tail=int(tail))
    return found


def _named_tensors(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [
        *module.named_parameters(remove_duplicate=False),
        *module.named_buffers(remove_duplicate=False),
    ]


def _decoder_layers(model: PreTrainedModel) -> list[tuple[str, int]]:
    layers = model.get_decoder().layers
    names = {id(module): name for name, module in model.named_modules()}
    return [(f"{names[id(layer)]}.", index) for index, layer in enumerate(layers)]


def _relative(tensors: dict[str, ExpertTensor], block: str) -> tuple[ExpertTensor, ...]:
    prefix = f"{block}."
    return tuple(
        ExpertTensor(name=name.removeprefix(prefix), axis=tensor.axis, tail=tensor.tail)
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    )


def _router_of(tensors: tuple[ExpertTensor, ...], experts: str, name: str) -> str:
    """Find the module beside the experts whose tensors count them."""
    owners = {tensor.name.partition(".")[0] for tensor in tensors if "." in tensor.name}
    owners.discard(experts)
    if len(owners) != 1 or "." in experts:
        raise FamilyError(
            f"{name} must have one router beside its experts, got {sorted(owners)}. This way "
            "of building a layer is not supported."
        )
    return owners.pop()


def _signature(router: nn.Module, tensors: tuple[ExpertTensor, ...]) -> str:
    """Return a key that is equal for routers that do the same, which are probed once."""
    scalars = [
        (path, sorted((k, v) for k, v in vars(module).items() if type(v) in _SCALARS))
        for path, module in router.named_modules()
    ]
    shapes = [(name, tuple(tensor.shape)) for name, tensor in _named_tensors(router)]
    return repr((type(router).__qualname__, scalars, shapes, tensors))


def _id_tables(block: nn.Module, router: str) -> tuple[ExpertTensor, ...]:
    """Find what tells a router the experts of a token id."""
    return tuple(
        ExpertTensor(name=f"{router}.{name}", holds_ids=True)
        for name, buffer in block.get_submodule(router).named_buffers()
        if not buffer.is_floating_point() and buffer.ndim == 2
    )


def _counts(block: nn.Module, larger: nn.Module, experts: int) -> tuple[CountAttribute, ...]:
    found = []
    others = dict(larger.named_modules())
    for path, module in block.named_modules():
        for name, value in vars(module).items():
            other = vars(others[path]).get(name)
            if type(value) is int and type(other) is int and other - value == experts:
                found.append(CountAttribute(module=path, name=name, tail=value - experts))
    return tuple(found)


def _config_copy(config: Any, entries: tuple[str, ...], experts: int) -> Any:
    """Copy a configuration for one layer, with its own number of experts.

    Args:
        config: The model's.
        entries: What says how many experts there are.
        experts: How many the layer has.

    Returns:
        A shallow copy.
    """
    copied = copy.copy(config)
    for entry in entries:
        setattr(copied, entry, experts)
    return copied


def set_expert_count(
    block: nn.Module, spec: LayerSpec, entries: tuple[str, ...], experts: int
) -> None:
    """Set what the modules of a layer say of how many experts they have.

    Args:
        block: The MoE block.
        spec: How the family builds the layer.
        entries: Entries of the configuration that say how many experts there are.
        experts: How many the layer has now.
    """
    for count in spec.counts:
        module = block.get_submodule(count.module)
        setattr(module, count.name, experts + count.tail)
    # Some routers ask the configuration, which all layers share.
    for module in block.get_submodule(spec.router).modules():
        if "config" in vars(module):
            own = _config_copy(module.config, entries, experts)
            setattr(module, "config", own)  # noqa: B010  declared by no base class
