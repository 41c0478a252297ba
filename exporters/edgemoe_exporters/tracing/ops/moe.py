"""Routing and experts as custom ops of a traced model.

Letters in shapes are those of `tracing.ops`.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch.nn import functional

from edgemoe.models.activation import Activation
from edgemoe.models.experts import ExpertsLayout
from edgemoe.models.routing.routers import route as route_by_rule
from edgemoe.models.routing.routers import shared_gates as shared_gates_by_rule
from edgemoe.models.routing.routers import weigh_chosen
from edgemoe.models.routing.rule import RouterRule, Scoring


@torch.library.custom_op("edgemoe::route", mutates_args=())
def route(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    logit_bias: torch.Tensor | None,
    correction_bias: torch.Tensor | None,
    expert_scale: torch.Tensor | None,
    chosen: torch.Tensor | None,
    k_cap: torch.Tensor,
    k_cap_index: int,
    top_k: int,
    scoring: str,
    softmax_over: str,
    renormalise: bool,
    sum_epsilon: float,
    scaling_factor: float,
    bias_on: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_fill: float,
    jitter: float,
    idle: int,
    shared: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose each token's experts and weights, as `edgemoe.models.routing.routers.route`.

    Args:
        hidden: Input of the router's projection, float `[T, H]`.
        weight: Router rows, float `[E, H]`, and a row for each idle choice and shared expert
            after those; biases have an entry for each idle choice too.
        logit_bias: Part of the logits, float `[E]`, or None.
        correction_bias: Added for the choice only, float `[E]`, or None.
        expert_scale: Multiplies each expert's weights, float `[E]`, or None.
        chosen: Experts that the token's id chooses, int64 `[T, top_k]`, or None.
        k_cap: Most experts a token may use, for every MoE layer, int64 `[L]`, each >= 1.
        k_cap_index: Which element of `k_cap` is this layer's.
        top_k: Experts per token without a cap.
        scoring: This and the following are those of
            `edgemoe.models.routing.rule.RouterRule`.
        softmax_over: `all` experts, or the `top_k` that are chosen.
        renormalise: Whether the weights of the chosen experts are divided by their sum.
        sum_epsilon: Added to that sum.
        scaling_factor: Multiplies the weights.
        bias_on: Scores or logits: the correction bias is added to these.
        n_group: Number of groups that the experts form.
        topk_group: Number of groups from which experts may be chosen.
        group_score: Score that ranks a group.
        group_fill: Choice score of experts outside the best groups.
        jitter: Of `sparsemixer`.
        idle: Number of choices that stand for no expert.
        shared: Number of experts that every token uses, and whose scores join the sum.

    Returns:
        Weights, float `[T, top_k]`, and expert ids, int64 `[T, top_k]`, best first. A slot
        beyond the cap, or of an idle choice, has weight 0 and id E.
    """
    rule = RouterRule(
        scoring=cast("Scoring", scoring),
        softmax_over="top_k" if softmax_over == "top_k" else "all",
        renormalise=renormalise,
        sum_epsilon=sum_epsilon,
        scaling_factor=scaling_factor,
        bias_on=cast("Literal['scores', 'logits']", bias_on),
        n_group=n_group,
        topk_group=topk_group,
        group_score=cast("Literal['top2', 'max']", group_score),
        group_fill=group_fill,
        jitter=jitter,
        idle=idle,
        shared=shared,
    )
    if chosen is not None:
        logits = functional.linear(hidden.float(), weight.float())
        routing = weigh_chosen(logits, chosen, rule, k_cap[k_cap_index])
        return routing.weights.contiguous(), routing.indices.contiguous()
    routing = route_by_rule(
        hidden,
        weight,
        correction_bias,
        rule,
        top_k,
        k_cap=k_cap[k_cap_index],
        logit_bias=logit_bias,
        expert_scale=expert_scale,
    )
    return routing.weights.contiguous(), routing.indices.contiguous()


@route.register_fake
def _(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    logit_bias: torch.Tensor | None,
    correction_bias: torch.Tensor | None,
    expert_scale: torch.Tensor | None,
    chosen: torch.Tensor | None,
    k_cap: torch.Tensor,
    k_cap_index: int,
    top_k: int,
    scoring: str,
    softmax_over: str,
    renormalise: bool,
    sum_epsilon: float,
    scaling_factor: float,
    bias_on: str,
    n_group: int,
    topk_group: int,
    group_score: str,
    group_fill: float,
    jitter: float,
    idle: int,
    shared: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (hidden.shape[0], top_k)
    return hidden.new_empty(shape), hidden.new_empty(shape, dtype=torch.int64)


@torch.library.custom_op("edgemoe::shared_gates", mutates_args=())
def shared_gates(
    hidden: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor, count: int, scale: float
) -> torch.Tensor:
    """Weigh the experts that every token uses, as `routing.routers.shared_gates` does.

    Args:
        hidden: Input of the router's projection, float `[T, H]`.
        weight: Router rows, float `[E + count, H]`.
        weights: Of the chosen experts, float `[T, k]`.
        count: How many experts every token uses.
        scale: What all weights of a token add up to.

    Returns:
        float `[T, count]`.
    """
    rows = weight[len(weight) - count :]
    scores = functional.linear(hidden.float(), rows.float()).sigmoid()
    return shared_gates_by_rule(scores, weights.float(), scale).to(hidden.dtype)


@shared_gates.register_fake
def _(
    hidden: torch.Tensor, weight: torch.Tensor, weights: torch.Tensor, count: int, scale: float
) -> torch.Tensor:
    return hidden.new_empty((hidden.shape[0], count))


@torch.library.custom_op("edgemoe::experts", mutates_args=())
def experts(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    is_transposed: bool,
    is_concatenated: bool,
    activation: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    gate_softcap: float,
    up_softcap: float,
) -> torch.Tensor:
    """Sum the chosen experts' outputs, each times its weight.

    Args:
        hidden: float `[T, H]`.
        indices: Expert ids, int64 `[T, k]`; an id equal to E is skipped.
        weights: float `[T, k]`.
        gate_up: First product, as the family stores it; see
            `edgemoe.models.experts.ExpertsLayout`.
        down: Second product, as the family stores it.
        gate_up_bias: float `[E, 2I]`, or None.
        down_bias: float `[E, H]`, or None.
        is_transposed: Whether weights are `[E, inputs, outputs]`.
        is_concatenated: Whether gate rows come before up rows, or alternate with them.
        activation: This and the following are those of
            `edgemoe.models.activation.Activation`.
        gated: Whether there is a gate.
        alpha: Slope inside `swish`.
        beta: Added to the up half.
        limit: Where both halves are cut off.
        gate_softcap: Bound of the gate as a factor.
        up_softcap: Bound of the up half.

    Returns:
        float `[T, H]`.
    """
    layout = ExpertsLayout(
        has_gate=gated,
        has_bias=gate_up_bias is not None,
        is_transposed=is_transposed,
        is_concatenated=is_concatenated,
    )
    act = Activation(
        kind=activation,
        gated=gated,
        alpha=alpha,
        beta=beta,
        limit=limit,
        gate_softcap=gate_softcap,
        up_softcap=up_softcap,
    )
    name = layout.gate_up_name
    output = torch.zeros_like(hidden)
    for expert in range(gate_up.shape[0]):
        token, slot = torch.where(indices == expert)
        first = layout.to_canonical(name, gate_up[expert])
        second = layout.to_canonical("down_proj", down[expert])
        bias = None
        if gate_up_bias is not None:
            bias = layout.to_canonical(f"{name}_bias", gate_up_bias[expert])
        units = functional.linear(hidden[token], first, bias)
        value = act(*units.chunk(2, dim=-1)) if gated else act(units)
        value = functional.linear(
            value, second, None if down_bias is None else down_bias[expert]
        )
        output.index_add_(0, token, value * weights[token, slot, None])
    return output


@experts.register_fake
def _(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    is_transposed: bool,
    is_concatenated: bool,
    activation: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    gate_softcap: float,
    up_softcap: float,
) -> torch.Tensor:
    return torch.empty_like(hidden)
