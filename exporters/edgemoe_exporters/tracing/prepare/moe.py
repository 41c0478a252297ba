"""Routers and experts in a trace: one custom op each, whatever the family's code does."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch.nn import functional

from edgemoe.models.factored_experts import FACTOR_NAMES
from edgemoe_exporters.tracing import ops

if TYPE_CHECKING:
    import contextlib

    import torch

    from edgemoe.models.layers.layer import MoeLayer


class Router(Protocol):
    """Replaces all routers of a model."""

    def route(
        self, layer: MoeLayer, position: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Return logits, weights and ids of one layer's router, and what comes after those."""
        ...


def replace_moe(
    stack: contextlib.ExitStack, module: Router, layer: MoeLayer, position: int
) -> None:
    """Replace a layer's router and experts by custom ops.

    Args:
        stack: Undoes the replacement.
        module: Replaces the router.
        layer: The layer; its router and activation are of known kinds.
        position: Of the layer among MoE layers.
    """
    roles = layer.spec.routing.tensors
    assert roles is not None
    router: Any = layer.router
    if roles.projection:
        _route_after(stack, module, layer, position, roles.projection)
    else:

        def route(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
            return module.route(layer, position, hidden)

        _replace_forward(stack, router, route)
    _replace_forward(stack, layer.experts, _experts_op(layer))


def _route_after(
    stack: contextlib.ExitStack,
    module: Router,
    layer: MoeLayer,
    position: int,
    projection: str,
) -> None:
    """Keep the router's transformation of its input, and replace its projection."""
    router: Any = layer.router
    inputs: list[torch.Tensor] = []
    assert layer.rule is not None
    classes = layer.num_experts + layer.rule.idle

    def keep(hidden: torch.Tensor) -> torch.Tensor:
        inputs[:] = [hidden]
        return hidden.new_zeros((*hidden.shape[:-1], classes))

    def route(hidden: torch.Tensor, *rest: Any, **options: Any) -> tuple[torch.Tensor, ...]:
        # Its choice for the zeros is not used, and leaves the graph; what else it returns, such
        # as a state for the next layer's router, comes before the rows.
        others = type(router).forward(router, hidden, *rest, **options)[3:]
        return *module.route(layer, position, inputs.pop()), *others

    _replace_forward(stack, router.get_submodule(projection), keep)
    _replace_forward(stack, router, route)


def _experts_op(layer: MoeLayer) -> Any:
    activation, layout = layer.activation, layer.layout
    assert activation is not None
    prefix = layer.spec.experts

    def factored(
        hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        biases = (f"{layout.gate_up_name}_bias", "down_proj_bias") if layout.has_bias else ()
        parts = [layer.tensor(f"{prefix}.{name}") for name in (*FACTOR_NAMES, *biases)]
        output: torch.Tensor = ops.factored_experts(
            hidden,
            indices,
            weights,
            *parts,
            *([None] * (len(FACTOR_NAMES) + 2 - len(parts))),
            layout.is_concatenated,
            activation.kind,
            activation.gated,
            activation.alpha,
            activation.beta,
            activation.limit,
            activation.gate_softcap,
            activation.up_softcap,
        )
        return output

    def experts(
        hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        name = layout.gate_up_name
        parts = [
            layer.tensor(f"{prefix}.{part}")
            for part in (name, "down_proj", f"{name}_bias", "down_proj_bias")
            if part in layout.names
        ]
        gate_up, down, *biases = parts
        output: torch.Tensor = ops.experts(
            hidden,
            indices,
            weights,
            gate_up,
            down,
            biases[0] if biases else None,
            biases[1] if biases else None,
            layout.is_transposed,
            layout.is_concatenated,
            activation.kind,
            activation.gated,
            activation.alpha,
            activation.beta,
            activation.limit,
            activation.gate_softcap,
            activation.up_softcap,
        )
        return output

    def based(
        hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        module: Any = layer.experts
        output = experts(functional.linear(hidden, module.input_basis), indices, weights)
        return functional.linear(output, module.output_basis)

    forward = factored if layer.is_factored else based if layer.is_based else experts
    roles = layer.spec.routing.tensors
    if roles is None or roles.gate_scale is None:
        return forward
    scale = roles.gate_scale

    def scaled(
        hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        return forward(hidden, indices, weights) * layer.tensor(scale)

    return scaled


def _replace_forward(stack: contextlib.ExitStack, module: Any, forward: Any) -> None:
    module.forward = forward
    stack.callback(delattr, module, "forward")
