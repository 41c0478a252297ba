"""Low-rank adapters by `peft`, on experts and on the linear layers beside them.

`peft` adapts the experts' weights where they are used: it puts W + (alpha / rank) B A in their
place for the time of a call, whatever way round the family stores them. So a step holds a
second copy of all experts. Routers and biases get no adapters, nor do embeddings and the
output head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import RecoveryError
from edgemoe.models.factored_experts import FACTOR_NAMES

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.recover.options import RecoverOptions

_ADAPTER = "default"
_BYTES = 4  # float32


@dataclass(frozen=True, kw_only=True)
class Adapters:
    """Adapters of a model.

    Attributes:
        tuner: What `peft` made of the decoder layers.
        parameters: Their parameters, by names in the model.
        copied_bytes: What the experts' weights take a second time in a step.
    """

    tuner: Any
    parameters: dict[str, nn.Parameter]
    copied_bytes: int

    def merge(self) -> None:
        """Add the adapters to the weights, and remove them; views of layers work again."""
        self.tuner.merge_and_unload()


def add_adapters(model: MoeModel, options: RecoverOptions) -> Adapters:
    """Add adapters that change nothing yet: B is zero.

    Args:
        model: The model; until they are merged its layers cannot be viewed.
        options: Settled options: rank, alpha, seed.

    Returns:
        The adapters.

    Raises:
        RecoveryError: `peft` cannot adapt a layer of the model.
    """
    from peft import LoraConfig, LoraModel

    decoder: Any = model.model.get_decoder().layers
    prefix = next(f"{name}." for name, m in model.model.named_modules() if m is decoder)
    experts = [f"{layer.name}.{name}" for layer in model.layers for name in _weights(layer)]
    linear = linear_names(model)
    copied = sum(model.model.get_parameter(name).numel() for name in experts)
    config = LoraConfig(
        r=options.rank or 0,
        lora_alpha=options.alpha or 0,  # type: ignore[arg-type]  # a float works as well
        target_modules=[name.removeprefix(prefix) for name in linear],
        target_parameters=[name.removeprefix(prefix) for name in experts],
        lora_dropout=0.0,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(options.seed)
        # Of a whole transformers model peft would take linear layers of certain names for
        # experts in a former layout, and change targets and ranks.
        tuner = LoraModel(decoder, config, _ADAPTER)
    found = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
    if len(found) != 2 * (len(linear) + len(experts)):
        raise RecoveryError(
            f"peft must adapt {len(linear)} linear layers and {len(experts)} expert tensors of "
            f"{model.family}, got {len(found) // 2} adapters. Use router-kd or uncurl."
        )
    return Adapters(tuner=tuner, parameters=found, copied_bytes=copied * _BYTES)


def linear_names(model: MoeModel) -> list[str]:
    """Name the linear layers of the decoder layers: attention, shared experts, dense layers.

    Args:
        model: The model.

    Returns:
        Their names in the model; without routers, and without layers that are linear in a way
        of their own.
    """
    routers = {id(module) for layer in model.layers for module in layer.router.modules()}
    layers: Any = model.model.get_decoder().layers
    inside = {id(module) for module in layers.modules()}
    return [
        name
        for name, module in model.model.named_modules()
        if type(module) is nn.Linear and id(module) in inside - routers
    ]


def _weights(layer: MoeLayer) -> list[str]:
    if layer.num_experts == 1 and layer.layout.is_transposed:
        raise RecoveryError(
            f"{layer.name} must have two or more experts to be adapted, because its family "
            "stores them transposed and peft then takes a single one for a plain layer, got 1. "
            "Use router-kd or uncurl."
        )
    names = FACTOR_NAMES if layer.is_factored else layer.layout.names[:2]
    return [f"{layer.spec.experts}.{name}" for name in names]
