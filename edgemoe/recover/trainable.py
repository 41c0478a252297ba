"""Which parameters are a model's routers, and which are its experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer


def router_parameters(model: MoeModel) -> dict[str, nn.Parameter]:
    """Name the parameters that decide which experts a token uses, and with which gates.

    All of a router module counts, and what else has an entry per expert outside the experts
    module. A bias that serves the choice only gets no gradient and so stays as it is; where a
    family keeps it in a buffer, it is not among them.

    Args:
        model: The model.

    Returns:
        The parameters by their names in the model, in its order.
    """
    found: list[torch.Tensor] = []
    for layer in model.layers:
        found += layer.router.parameters()
        found += [layer.tensor(name) for name in _names(layer, of_experts=False)]
    return _named(model, found)


def expert_parameters(model: MoeModel) -> dict[str, nn.Parameter]:
    """Name the weights and biases of all routed experts, whole or factored.

    Args:
        model: The model.

    Returns:
        The parameters by their names in the model, in its order.
    """
    return _named(
        model,
        [
            layer.tensor(name)
            for layer in model.layers
            for name in _names(layer, of_experts=True)
        ],
    )


def _names(layer: MoeLayer, *, of_experts: bool) -> list[str]:
    prefix = f"{layer.spec.experts}."
    return [
        spec.name
        for spec in layer.spec.tensors
        if not spec.holds_ids and spec.name.startswith(prefix) == of_experts
    ]


def _named(model: MoeModel, tensors: Iterable[torch.Tensor]) -> dict[str, nn.Parameter]:
    wanted = {id(tensor) for tensor in tensors if isinstance(tensor, nn.Parameter)}
    return {
        name: parameter
        for name, parameter in model.model.named_parameters()
        if id(parameter) in wanted
    }
