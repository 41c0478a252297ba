"""The gradient of the loss at what every MoE layer gives, one backward pass for all of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgemoe.models.hooks import logits_module, observe
from edgemoe.oracle.oracle import inputs_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing


@dataclass(frozen=True)
class LayerGradient:
    """One MoE layer in a pass over one window.

    Attributes:
        layer: The layer.
        hidden: What reaches its experts, `[tokens, hidden]`.
        router_hidden: What its router rows are multiplied with, `[tokens, inputs]`: some
            routers transform what reaches them, and a k policy sees the result.
        routing: What its router decides.
        gradient: Of the loss, summed over tokens, at what its routed experts give together,
            `[tokens, hidden]`.
    """

    layer: MoeLayer
    hidden: torch.Tensor
    router_hidden: torch.Tensor
    routing: Routing
    gradient: torch.Tensor


def take_gradients(model: MoeModel, window: Window) -> list[LayerGradient]:
    """Run a window forward and backward.

    The loss is the cross-entropy of the next token; weights have no gradient.

    Args:
        model: The model, in memory as a whole; it is as before when this returns.
        window: Two tokens or more.

    Returns:
        One entry per MoE layer.
    """
    seen: dict[int, tuple[torch.Tensor, torch.Tensor, Routing]] = {}
    router_hidden: dict[int, torch.Tensor] = {}
    deltas: dict[int, torch.Tensor] = {}

    def keep(layer: MoeLayer, hidden: torch.Tensor, routing: Routing, _: Any) -> None:
        detached = routing._replace(
            logits=routing.logits.detach(), weights=routing.weights.detach()
        )
        seen[layer.index] = hidden.detach(), router_hidden.pop(layer.index), detached

    def keep_router_hidden(index: int) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def hook(_: Any, given: tuple[torch.Tensor, ...]) -> None:
            router_hidden[index] = given[0].detach().reshape(-1, given[0].shape[-1])

        return hook

    def add_nothing(index: int) -> Callable[[Any, Any, torch.Tensor], torch.Tensor]:
        def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
            deltas[index] = torch.zeros_like(output, requires_grad=True)
            return output + deltas[index]

        return hook

    with torch.enable_grad(), observe(model, keep), contextlib.ExitStack() as stack:
        for layer in model.layers:
            rows = logits_module(layer)
            for hook in (
                layer.experts.register_forward_hook(add_nothing(layer.index)),
                rows.register_forward_pre_hook(keep_router_hidden(layer.index)),
            ):
                stack.callback(hook.remove)
        logits = model.model(**inputs_of(window)).logits[0]
        target = torch.tensor(window.ids[1:], device=logits.device)
        loss = functional.cross_entropy(logits[:-1].float(), target, reduction="sum")
        found = torch.autograd.grad(loss, [deltas[layer.index] for layer in model.layers])
    return [
        LayerGradient(layer, *seen[layer.index], gradient)
        for layer, gradient in zip(model.layers, found, strict=True)
    ]
