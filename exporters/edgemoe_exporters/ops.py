"""The opaque ops of a traced model, with a reference implementation in torch.

Five things differ so much between engines that the trace keeps them whole, as nodes of the
ONNX domain ``edgemoe``: Route, Experts, Attention, RotaryEmbedding and RMSNorm. Each is a
torch custom op here, so that a model prepared for tracing still runs eagerly.

Letters in shapes: T tokens, B batch, S new tokens of a row, P cached tokens, E experts,
k chosen experts, H hidden size, I intermediate size of an expert, N query heads, M key and
value heads, D head size, R rotated part of a head, L MoE layers.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from edgemoe.models.contract import RouterRule
from edgemoe.models.routers import route as route_by_rule

DOMAIN = "edgemoe"


@torch.library.custom_op("edgemoe::route", mutates_args=())
def route(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    k_cap: torch.Tensor,
    k_cap_index: int,
    top_k: int,
    scoring: str,
    renormalise: bool,
    scaling_factor: float,
    n_group: int,
    topk_group: int,
    softmax_over: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts and their weights for each token, as :func:`edgemoe.models.routers.route`.

    Args:
        hidden: What the router sees, float ``[T, H]``.
        weight: Router matrix, float ``[E, H]``.
        correction_bias: Added to the scores for the choice only, float ``[E]``, or None.
        k_cap: Most experts a token may use, for every MoE layer, int64 ``[L]``, each >= 1.
        k_cap_index: Which element of ``k_cap`` is this layer's.
        top_k: Experts per token without a cap.
        scoring: ``softmax`` or ``sigmoid``.
        renormalise: Whether the weights of the chosen experts are divided by their sum.
        scaling_factor: Multiplies the weights.
        n_group: Number of groups that the experts form.
        topk_group: Number of groups from which experts may be chosen.
        softmax_over: ``all`` experts, or the ``top_k`` that are chosen.

    Returns:
        Weights, float ``[T, top_k]``, and expert ids, int64 ``[T, top_k]``, best first. A slot
        beyond the cap has weight 0 and id E.
    """
    rule = RouterRule(
        scoring="sigmoid" if scoring == "sigmoid" else "softmax",
        renormalise=renormalise,
        scaling_factor=scaling_factor,
        has_correction_bias=correction_bias is not None,
        n_group=n_group,
        topk_group=topk_group,
        softmax_over="top_k" if softmax_over == "top_k" else "all",
    )
    routing = route_by_rule(
        hidden, weight, correction_bias, rule, top_k, k_cap=k_cap[k_cap_index]
    )
    return routing.weights.contiguous(), routing.indices.contiguous()


@route.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    k_cap: torch.Tensor,
    k_cap_index: int,
    top_k: int,
    scoring: str,
    renormalise: bool,
    scaling_factor: float,
    n_group: int,
    topk_group: int,
    softmax_over: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (hidden.shape[0], top_k)
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("edgemoe::experts", mutates_args=())
def experts(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    """Sum the chosen experts' outputs, each times its weight.

    Args:
        hidden: float ``[T, H]``.
        indices: Expert ids, int64 ``[T, k]``; an id equal to E is skipped.
        weights: float ``[T, k]``.
        gate_up: float ``[E, 2I, H]``: I rows of the gate, then I rows of the up projection.
        down: float ``[E, H, I]``.
        activation: What the gate passes through: ``silu``.

    Returns:
        float ``[T, H]``.
    """
    if activation != "silu":
        raise ValueError(f"activation must be silu, got {activation!r}.")
    output = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(indices == expert)
        gate, up = functional.linear(hidden[token], gate_up[expert]).chunk(2, dim=-1)
        value = functional.linear(functional.silu(gate) * up, down[expert])
        output.index_add_(0, token, value * weights[token, slot, None])
    return output


@experts.register_fake
def _(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    activation: str,
) -> torch.Tensor:
    return torch.empty_like(hidden)


@torch.library.custom_op("edgemoe::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    attention_mask: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend to cached and new positions, causally, with grouped key and value heads.

    Column j of the mask belongs to cache slot j, whatever padding the batch has: a new token
    i of a row attends to the slots ``j <= P + i`` whose mask is not 0.

    Args:
        query: Rotated queries, float ``[B, N, S, D]``.
        key: Rotated keys, float ``[B, M, S, D]``; M divides N.
        value: float ``[B, M, S, D]``.
        past_key: float ``[B, M, P, D]``.
        past_value: float ``[B, M, P, D]``.
        attention_mask: int64 ``[B, P + S]``, 0 where a slot is padding.
        scale: Multiplies the scores.
        sliding_window: A token sees only this many latest slots; 0 for all.

    Returns:
        float ``[B, S, N, D]``, and the keys and the values of past and new tokens, float
        ``[B, M, P + S, D]``.
    """
    present_key = torch.cat([past_key, key], dim=2)
    present_value = torch.cat([past_value, value], dim=2)
    total, new = present_key.shape[2], query.shape[2]
    column = torch.arange(total)
    row = torch.arange(total - new, total)[:, None]
    visible = column <= row
    if sliding_window:
        visible &= column > row - sliding_window
    allowed = visible & (attention_mask[:, None, None, :] != 0)
    # A finite number: a padding row that sees nothing must not become NaN.
    bias = torch.where(allowed, 0.0, torch.finfo(query.dtype).min).to(query.dtype)
    output = functional.scaled_dot_product_attention(
        query, present_key, present_value, attn_mask=bias, scale=scale, enable_gqa=True
    )
    return output.transpose(1, 2).contiguous(), present_key, present_value


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    attention_mask: torch.Tensor,
    scale: float,
    sliding_window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, new, _ = query.shape
    slots = past_key.shape[2] + new
    present_key = key.new_empty((batch, key.shape[1], slots, key.shape[3]))
    present_value = value.new_empty((batch, value.shape[1], slots, value.shape[3]))
    return query.new_empty((batch, new, heads, value.shape[3])), present_key, present_value


@torch.library.custom_op("edgemoe::rotary", mutates_args=())
def rotary(
    states: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Rotate the first R numbers of each head by its position; halves, not interleaved.

    Args:
        states: float ``[B, N, S, D]``.
        position_ids: int64 ``[B, S]``.
        inv_freq: Angles per position, float32 ``[R / 2]``, R <= D.
        scaling: Multiplies sine and cosine.

    Returns:
        float ``[B, N, S, D]``.
    """
    angles = position_ids[:, None, :, None].float() * inv_freq
    cos = (angles.cos() * scaling).to(states.dtype)
    sin = (angles.sin() * scaling).to(states.dtype)
    half = inv_freq.shape[0]
    first, second = states[..., :half], states[..., half : 2 * half]
    rest = states[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(turned, dim=-1)


@rotary.register_fake
def _(
    states: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float
) -> torch.Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)


@torch.library.custom_op("edgemoe::rms_norm", mutates_args=())
def rms_norm(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    """Divide by the root mean square over the last axis, then multiply by ``weight``.

    Args:
        states: float ``[..., H]``.
        weight: float ``[H]``.
        epsilon: Added to the mean square.

    Returns:
        float ``[..., H]``; the mean square is taken in float32.
    """
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(states.dtype)


@rms_norm.register_fake
def _(states: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)
