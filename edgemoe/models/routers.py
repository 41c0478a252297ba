"""How the routers of the families choose experts.

:func:`route` equals the transformers routers, in float32 throughout: two experts may differ
by less than float16 resolves, and then a rounded score picks the wrong one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from edgemoe.models.contract import RouterRule

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# What transformers adds to the sum of sigmoid gates before it divides by it.
_SIGMOID_SUM_EPSILON = 1e-20


class Routing(NamedTuple):
    """What a router decided.

    Attributes:
        logits: float32 [tokens, experts].
        weights: Gates [tokens, top_k]; 0 in slots that are not used.
        indices: Experts int64 [tokens, top_k]; the number of experts, a sentinel, in slots
            that are not used.
    """

    logits: torch.Tensor
    weights: torch.Tensor
    indices: torch.Tensor


def route(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    correction_bias: torch.Tensor | None,
    rule: RouterRule,
    top_k: int,
    k_cap: torch.Tensor | int | None = None,
) -> Routing:
    """Choose experts for each token.

    Args:
        hidden: Router inputs [tokens, hidden].
        weight: Router rows [experts, hidden].
        correction_bias: [experts], where the rule has one.
        rule: How the family chooses.
        top_k: Experts per token.
        k_cap: At most this many, in [1, inf); an int64 scalar tensor stays symbolic.

    Returns:
        Logits, gates and experts, float32; experts by falling choice score.
    """
    logits = torch.nn.functional.linear(hidden.float(), weight.float())
    return select(logits, correction_bias, rule, top_k, k_cap)


def select(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    rule: RouterRule,
    top_k: int,
    k_cap: torch.Tensor | int | None = None,
) -> Routing:
    """Choose experts for each token, from logits.

    The first min(top_k, k_cap) experts by choice score are used; where the rule
    renormalises, it does so over those.

    Args:
        logits: [tokens, experts].
        correction_bias: [experts], where the rule has one.
        rule: How the family chooses.
        top_k: Experts per token.
        k_cap: At most this many, in [1, inf); an int64 scalar tensor stays symbolic.

    Returns:
        Logits, gates and experts, float32; experts by falling choice score.
    """
    logits = logits.float()
    scores = _score(logits, rule)
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if rule.topk_group < rule.n_group:
        choice = _mask_groups(choice, rule)
    indices = torch.topk(choice, top_k, dim=-1, sorted=True).indices
    weights = scores.gather(-1, indices)
    used = None
    if k_cap is not None:
        used = torch.arange(top_k, device=logits.device) < k_cap
    weights = _gate(weights, rule, used)
    if used is not None:
        weights = torch.where(used, weights, torch.zeros_like(weights))
        indices = torch.where(used, indices, torch.full_like(indices, logits.shape[-1]))
    return Routing(logits, weights, indices)


def is_near_tie(
    logits: torch.Tensor, correction_bias: torch.Tensor | None, rule: RouterRule, top_k: int
) -> torch.Tensor:
    """Find the tokens whose experts another engine may rightly choose differently.

    The last expert chosen and the best one left are then as good as equal: their choice
    scores differ by no more than the rounding of the scores and of the logits behind them.

    Args:
        logits: float32 [tokens, experts].
        correction_bias: [experts], where the rule has one.
        rule: How the family chooses.
        top_k: Experts per token.

    Returns:
        bool [tokens].
    """
    logits = logits.float()
    choice = _score(logits, rule)
    if correction_bias is not None:
        choice = choice + correction_bias.float()
    if rule.topk_group < rule.n_group:
        choice = _mask_groups(choice, rule)
    if top_k >= choice.shape[-1]:
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    best = torch.topk(choice, top_k + 1, dim=-1, sorted=True).values
    last, next_best = best[..., -2], best[..., -1]
    epsilon = torch.finfo(torch.float32).eps
    # Sigmoid and softmax are nowhere steeper than 1/4.
    slope = 1.0 if rule.softmax_over == "top_k" else 0.25
    rounding = 2 * epsilon * last.abs() + slope * 32 * epsilon * logits.abs().amax(dim=-1)
    return last - next_best <= rounding


def _score(logits: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    if rule.scoring == "sigmoid":
        return logits.sigmoid()
    if rule.softmax_over == "top_k":
        return logits
    return torch.nn.functional.softmax(logits, dim=-1)


def _mask_groups(choice: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    """Set the choice scores outside the best groups to minus infinity."""
    grouped = choice.reshape(*choice.shape[:-1], rule.n_group, -1)
    group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    best = torch.topk(group_scores, rule.topk_group, dim=-1, sorted=False).indices
    mask = torch.zeros_like(group_scores).scatter(-1, best, 1.0).bool()
    return grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).flatten(-2)


def _gate(scores: torch.Tensor, rule: RouterRule, used: torch.Tensor | None) -> torch.Tensor:
    if rule.scoring == "softmax" and rule.softmax_over == "top_k":
        if used is not None:
            scores = scores.masked_fill(~used, float("-inf"))
        scores = torch.nn.functional.softmax(scores, dim=-1)
    elif rule.renormalise:
        kept = scores if used is None else torch.where(used, scores, torch.zeros_like(scores))
        total = kept.sum(dim=-1, keepdim=True)
        if rule.scoring == "sigmoid":
            total = total + _SIGMOID_SUM_EPSILON
        scores = scores / total
    return scores if rule.scaling_factor == 1.0 else scores * rule.scaling_factor


def glm4_moe_rule(config: PreTrainedConfig) -> RouterRule:
    """Read the rule of GLM-4.5's router: sigmoid scores, groups, correction bias.

    Args:
        config: A ``Glm4MoeConfig``.

    Returns:
        The rule.
    """
    return RouterRule(
        scoring="sigmoid",
        renormalise=bool(config.norm_topk_prob),
        scaling_factor=float(config.routed_scaling_factor),
        has_correction_bias=True,
        n_group=int(config.n_group),
        topk_group=int(config.topk_group),
        # Its groups are ranked by their two best experts, even where there is one group.
        min_group_size=2,
    )


def qwen2_moe_rule(config: PreTrainedConfig) -> RouterRule:
    """Read the rule of Qwen2-MoE's router: softmax over all experts.

    Args:
        config: A ``Qwen2MoeConfig``.

    Returns:
        The rule.
    """
    return RouterRule(scoring="softmax", renormalise=bool(config.norm_topk_prob))


def mixtral_rule(config: PreTrainedConfig) -> RouterRule:
    """Give the rule of Mixtral's router: softmax over all experts, then renormalised.

    Args:
        config: A ``MixtralConfig``; nothing in it changes the rule.

    Returns:
        The rule.
    """
    del config
    return RouterRule(scoring="softmax", renormalise=True)
