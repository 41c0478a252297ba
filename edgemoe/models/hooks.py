"""Watch and limit the routing of a model that runs eagerly."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgemoe.errors import EdgemoeError
from edgemoe.k_rule import KRule
from edgemoe.models.routing.routers import Routing, select, shared_gates, shared_scores

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer

    ExpertsFunction = Callable[[int, torch.Tensor], torch.Tensor]
    Observer = Callable[[MoeLayer, torch.Tensor, Routing, ExpertsFunction], None]


@contextlib.contextmanager
def observe(model: MoeModel, callback: Observer) -> Iterator[None]:
    """Call back for each MoE layer of each forward pass, before its experts run.

    Args:
        model: The model to watch.
        callback: Gets the layer, the hidden states [tokens, hidden] that reach the router and
            the experts, the routing that the model uses (a cap included; slots in the
            family's own order; logits of idle choices after those of experts), and a function
            from (expert, hidden [n, hidden]) to that expert's output [n, hidden], without its
            gate.

    Yields:
        Nothing; the callbacks stop with the block.
    """
    with contextlib.ExitStack() as stack:
        for layer in model.layers:
            _observe_layer(layer, callback, stack)
        yield


def _observe_layer(layer: MoeLayer, callback: Observer, stack: contextlib.ExitStack) -> None:
    logits: list[torch.Tensor] = []

    def keep_logits(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        # A router may have classes that are no routed expert, after those that are.
        classes = layer.num_experts + (layer.rule.further_rows if layer.rule else 0)
        logits[:] = [_logits(layer, arguments[0], output)[:, :classes]]

    def call_back(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        hidden, indices, weights = arguments
        if layer.rule is not None and layer.rule.idle:
            # The family names some expert, with a gate of 0, where a token uses none.
            indices = indices.masked_fill(weights == 0, layer.num_experts)
        routing = Routing(logits.pop().float(), weights, indices)
        callback(layer, hidden, routing, layer.expert_output)

    # What the experts are given is what counts, whoever changed it after the router.
    stack.callback(logits_module(layer).register_forward_hook(keep_logits).remove)
    stack.callback(layer.experts.register_forward_pre_hook(call_back).remove)


def _logits(layer: MoeLayer, hidden: torch.Tensor, output: Any) -> torch.Tensor:
    """Return logits [tokens, experts + further rows] of a call of `logits_module`."""
    if layer.rule is not None and layer.rule.shared:
        # The router keeps those of shared experts to itself.
        flat = hidden.reshape(-1, hidden.shape[-1])
        return functional.linear(flat.float(), layer.router_weight.float())
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output[0]
    return found.reshape(-1, found.shape[-1])


def logits_module(layer: MoeLayer) -> nn.Module:
    """Return what computes the logits.

    Args:
        layer: The layer.

    Returns:
        The router, or the submodule that applies its rows where it transforms its input before
        or returns something else.
    """
    roles = layer.spec.routing.tensors
    if roles is None or not roles.projection:
        return layer.router
    return layer.router.get_submodule(roles.projection)


@contextlib.contextmanager
def limit_k(model: MoeModel, k_cap: int | Sequence[int]) -> Iterator[None]:
    """Limit each token to `k_cap` experts.

    Args:
        model: The model to limit.
        k_cap: One cap for all MoE layers, or one for each, in [1, inf).

    Yields:
        Nothing; the limit ends with the block.

    Raises:
        EdgemoeError: A cap is below 1, or there are not as many as MoE layers.
    """
    caps = check_k_cap(k_cap, len(model.layers))
    with contextlib.ExitStack() as stack:
        for layer, cap in zip(model.layers, caps, strict=True):
            if cap < layer.slots:
                follow(layer, stack, cap)
        yield


def check_k_cap(k_cap: int | Sequence[int], moe_layers: int) -> list[int]:
    """Check caps, and spread a single one over all MoE layers.

    Args:
        k_cap: One cap for all MoE layers, or one for each.
        moe_layers: How many there are.

    Returns:
        One cap for each MoE layer.

    Raises:
        EdgemoeError: A cap is below 1, or there are not as many as MoE layers.
    """
    caps = [k_cap] * moe_layers if isinstance(k_cap, int) else list(k_cap)
    if len(caps) != moe_layers:
        raise EdgemoeError(
            f"k_cap must have one value for each of the {moe_layers} MoE layers, got "
            f"{len(caps)}. Give one number for all, or as many as there are layers."
        )
    if any(isinstance(cap, bool) or not isinstance(cap, int) or cap < 1 for cap in caps):
        raise EdgemoeError(f"k_cap must be integers in [1, inf), got {k_cap}. Use 1 or more.")
    return caps


def follow(layer: MoeLayer, stack: contextlib.ExitStack, cap: int | None = None) -> None:
    """Make a layer's tokens use as many experts as its rule says, and no more than a cap.

    Args:
        layer: The layer.
        stack: Undoes it.
        cap: Most experts of a token, in [1, inf); None sets no cap.
    """
    rule = layer.k_rule or KRule(slots=layer.top_k)
    slots = rule.slots if cap is None else min(rule.slots, cap)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def keep_logits(_: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        seen[:] = [(arguments[0], _logits(layer, arguments[0], output))]

    def limit(
        _: nn.Module, __: tuple[Any, ...], output: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...]:
        first, weights, indices, *rest = output
        if layer.rule is None:
            weights, indices = _drop_smallest(weights, indices, slots, layer.num_experts)
        else:
            hidden, logits = seen.pop()
            wanted = rule.limit(hidden.reshape(-1, hidden.shape[-1]))
            if isinstance(wanted, torch.Tensor):
                wanted = wanted.clamp(max=slots)
            routing = select(
                logits,
                layer.correction_bias,
                layer.rule,
                max(rule.slots, layer.top_k),
                slots if isinstance(wanted, int) else wanted,
                expert_scale=layer.expert_scale,
                top_p=rule.top_p,
            )
            shape = (*weights.shape[:-1], routing.weights.shape[-1])
            weights = routing.weights.to(weights.dtype).reshape(shape)
            indices = routing.indices.reshape(shape)
            scores = shared_scores(routing.logits, layer.rule)
            if scores is not None:
                # What is left goes to the experts that every token uses.
                scale = layer.rule.scaling_factor
                total = scale if layer.gate_scale is None else scale * layer.gate_scale
                rest[0] = shared_gates(scores, routing.weights, total).to(weights.dtype)
        return first, weights, indices, *rest

    stack.callback(logits_module(layer).register_forward_hook(keep_logits).remove)
    stack.callback(layer.router.register_forward_hook(limit).remove)
    # The faster implementations skip sentinels only where they expect them, and would read
    # memory that was never written otherwise.
    before = bool(getattr(layer.experts, _EXPECTS_SENTINELS))
    setattr(layer.experts, _EXPECTS_SENTINELS, True)
    stack.callback(setattr, layer.experts, _EXPECTS_SENTINELS, before)


def _drop_smallest(
    weights: torch.Tensor, indices: torch.Tensor, cap: int, num_experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keep the slots with the largest gates; the gates of a router without a rule stay."""
    order = weights.argsort(dim=-1, descending=True, stable=True)
    dropped = order.argsort(dim=-1) >= cap
    return weights.masked_fill(dropped, 0), indices.masked_fill(dropped, num_experts)


_EXPECTS_SENTINELS = "_is_expert_parallel"
