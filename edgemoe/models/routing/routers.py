"""How routers choose experts, whatever their family.

`route` equals the transformers routers, in float32 throughout: two experts may differ
by less than float16 resolves, and then a rounded score picks the wrong one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from edgemoe.models.routing.rule import RouterRule


class Routing(NamedTuple):
    """Experts and gates that a router chose.

    Attributes:
        logits: float32 [tokens, experts], and a column for each of the rule's further rows.
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
    *,
    logit_bias: torch.Tensor | None = None,
    expert_scale: torch.Tensor | None = None,
    top_p: float | None = None,
) -> Routing:
    """Choose experts for each token.

    Args:
        hidden: Router inputs [tokens, hidden].
        weight: Router rows [experts, hidden].
        correction_bias: [experts], where the rule has one.
        rule: How the family chooses.
        top_k: Experts per token.
        k_cap: At most this many, in [1, inf); an int64 scalar tensor stays symbolic, and one
            [tokens, 1] limits each token on its own.
        logit_bias: [experts], where the rule has one.
        expert_scale: [experts], where the rule has one.
        top_p: As of `select`.

    Returns:
        Logits, gates and experts, float32; experts by falling choice score.
    """
    bias = None if logit_bias is None else logit_bias.float()
    logits = torch.nn.functional.linear(hidden.float(), weight.float(), bias)
    return select(
        logits, correction_bias, rule, top_k, k_cap, expert_scale=expert_scale, top_p=top_p
    )


def select(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    rule: RouterRule,
    top_k: int,
    k_cap: torch.Tensor | int | None = None,
    *,
    expert_scale: torch.Tensor | None = None,
    top_p: float | None = None,
) -> Routing:
    """Choose experts for each token, from logits.

    The first min(top_k, k_cap) experts by choice score are used; where the rule renormalises,
    it does so over those. With `top_p`, an expert is used as long as those before it have less
    than that share of the token's router probability (`probability_of`) together: the smallest
    set that reaches it, as in Huang et al., 2024 (https://arxiv.org/abs/2403.07652, equation
    4).

    Args:
        logits: [tokens, experts], and a column for each of the rule's further rows.
        correction_bias: [experts], and an entry for each idle choice, where the rule has one.
        rule: How the family chooses.
        top_k: Experts per token.
        k_cap: At most this many, in [1, inf); an int64 scalar tensor stays symbolic, and one
            [tokens, 1] limits each token on its own.
        expert_scale: [experts], where the rule has one.
        top_p: Share of the mass that a token's experts must reach, in (0, 1]; None asks for
            none.

    Returns:
        Logits, gates and experts, float32; experts by falling choice score.
    """
    every, logits = logits.float(), choices_of(logits.float(), rule)
    experts = logits.shape[-1] - rule.idle
    used = None
    if k_cap is not None:
        used = torch.arange(top_k, device=logits.device) < k_cap
    if rule.scoring == "sparsemixer":
        weights, indices = sparsemixer(logits, rule.jitter, top_k)
        used = _reach(logits, indices, rule, top_p, used)
    else:
        scores = _score(logits, rule)
        choice = _choice(logits, scores, correction_bias, rule)
        indices = torch.topk(choice, top_k, dim=-1, sorted=True).indices
        used = _reach(logits, indices, rule, top_p, used)
        shared = shared_scores(every, rule)
        weights = _gate(scores.gather(-1, indices), rule, used, shared)
    if expert_scale is not None:
        weights = weights * expert_scale.float()[indices]
    if rule.scaling_factor != 1.0:
        weights = weights * rule.scaling_factor
    if rule.idle:
        used = indices < experts if used is None else used & (indices < experts)
    if used is not None:
        weights = torch.where(used, weights, torch.zeros_like(weights))
        indices = torch.where(used, indices, torch.full_like(indices, experts))
    return Routing(every, weights, indices)


def weigh_chosen(
    logits: torch.Tensor, chosen: torch.Tensor, rule: RouterRule, k_cap: torch.Tensor | int
) -> Routing:
    """Weigh experts that something else than the logits chose, such as a token's id.

    Args:
        logits: [tokens, experts].
        chosen: Distinct experts of each token, int64 [tokens, top_k].
        rule: How gates follow from scores; the sum runs over all that were chosen.
        k_cap: A token keeps this many, those of the largest gates.

    Returns:
        Logits, gates and experts, float32; experts by falling gate.
    """
    logits = logits.float()
    weights = _gate(_score(logits, rule).gather(-1, chosen), rule, None, None)
    weights, order = weights.sort(dim=-1, descending=True, stable=True)
    used = torch.arange(chosen.shape[-1], device=logits.device) < k_cap
    indices = chosen.gather(-1, order)
    return Routing(
        logits,
        torch.where(used, weights * rule.scaling_factor, torch.zeros_like(weights)),
        torch.where(used, indices, torch.full_like(indices, logits.shape[-1])),
    )


def choices_of(logits: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    """Return the logits that choose: those of experts and of idle choices.

    Args:
        logits: [..., experts + further rows].
        rule: How the family chooses.

    Returns:
        [..., experts + idle choices].
    """
    return logits[..., : logits.shape[-1] - rule.shared]


def shared_scores(logits: torch.Tensor, rule: RouterRule) -> torch.Tensor | None:
    """Return the scores of experts that every token uses and the router weighs.

    Args:
        logits: float32 [tokens, experts + further rows].
        rule: How the family chooses.

    Returns:
        float32 [tokens, shared]; None where there are no such experts.
    """
    if not rule.shared:
        return None
    return _score(logits[..., logits.shape[-1] - rule.shared :], rule)


def shared_gates(
    scores: torch.Tensor, weights: torch.Tensor, scale: torch.Tensor | float
) -> torch.Tensor:
    """Compute the gates of experts that every token uses: the rest, by their scores.

    Args:
        scores: Of `shared_scores`, [tokens, shared].
        weights: Gates of the chosen experts, [tokens, top_k].
        scale: What all gates add up to.

    Returns:
        [tokens, shared].
    """
    rest = scale - weights.sum(dim=-1, keepdim=True)
    return rest * scores / scores.sum(dim=-1, keepdim=True)


def probability_of(logits: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    """Share a token's attention to experts out: what `top_p` is a share of.

    Args:
        logits: [tokens, experts].
        rule: How the family chooses.

    Returns:
        float32 [tokens, experts + idle choices], each row with a sum of 1: the softmax of the
        logits, or the scores divided by their sum where they are no softmax.
    """
    logits = choices_of(logits.float(), rule)
    if rule.scoring in ("sigmoid", "sqrtsoftplus"):
        scores = _score(logits, rule)
        return scores / scores.sum(dim=-1, keepdim=True)
    return torch.nn.functional.softmax(logits, dim=-1)


def probability_before(
    logits: torch.Tensor, indices: torch.Tensor, rule: RouterRule
) -> torch.Tensor:
    """Add up the router probability of the experts that come before each chosen one.

    Args:
        logits: [tokens, experts].
        indices: Chosen experts, best first, int64 [tokens, slots].
        rule: How the family chooses.

    Returns:
        float32 [tokens, slots], ascending, the first column 0.
    """
    mass = probability_of(logits, rule).gather(-1, indices)
    return torch.nn.functional.pad(mass.cumsum(dim=-1)[..., :-1], (1, 0))


def _reach(
    logits: torch.Tensor,
    indices: torch.Tensor,
    rule: RouterRule,
    top_p: float | None,
    used: torch.Tensor | None,
) -> torch.Tensor | None:
    """Return which slots stay used once a share of the router probability is reached."""
    if top_p is None:
        return used
    # The first slot has nothing before it, so a token always has an expert.
    wanted = probability_before(logits, indices, rule) < top_p
    return wanted if used is None else wanted & used


def sparsemixer(
    logits: torch.Tensor, jitter: float, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts one after the other, as PhiMoE does when it is not trained.

    The gate of each is its softmax among the experts left whose logit is within a band
    `2 * jitter * max(|logit|, best)` below the best one left (SparseMixer-v2,
    https://arxiv.org/abs/2409.12136).

    Args:
        logits: float32 [tokens, experts].
        jitter: Width of the band, relative.
        top_k: Experts per token.

    Returns:
        Gates float32 [tokens, top_k] and experts int64 [tokens, top_k].
    """
    left = logits
    gates, indices = [], []
    for _ in range(top_k):
        best, index = left.max(dim=-1, keepdim=True)
        band = (best - logits) / torch.maximum(logits.abs(), best)
        near = left.masked_fill(band > 2 * jitter, float("-inf"))
        gates.append(torch.softmax(near, dim=-1).gather(-1, index))
        indices.append(index)
        left = left.scatter(-1, index, float("-inf"))
    return torch.cat(gates, dim=-1), torch.cat(indices, dim=-1)


def is_near_tie(
    logits: torch.Tensor,
    correction_bias: torch.Tensor | None,
    rule: RouterRule,
    used: torch.Tensor | int,
) -> torch.Tensor:
    """Find the tokens whose experts another engine may rightly choose differently.

    The last expert chosen and the best one left are then as good as equal: their choice
    scores differ by no more than the rounding of the scores and of the logits behind them.

    Args:
        logits: float32 [tokens, experts].
        correction_bias: [experts], where the rule has one.
        rule: How the family chooses.
        used: Experts of every token, or int64 [tokens] those of each, in [1, experts].

    Returns:
        bool [tokens].
    """
    logits = choices_of(logits.float(), rule)
    raw = rule.scoring == "sparsemixer"
    choice = logits if raw else _choice(logits, _score(logits, rule), correction_bias, rule)
    best = torch.sort(choice, dim=-1, descending=True).values
    # After the last there is nothing to tie with.
    best = torch.nn.functional.pad(best, (0, 1), value=float("-inf"))
    places = torch.as_tensor(used, device=logits.device).expand(len(logits))[:, None]
    last, next_best = best.gather(-1, places - 1)[:, 0], best.gather(-1, places)[:, 0]
    epsilon = torch.finfo(torch.float32).eps
    # Sigmoid and softmax are nowhere steeper than 1/4, the root of softplus than 0.4.
    by_logits = raw or rule.softmax_of_chosen or rule.bias_on == "logits"
    slope = 1.0 if by_logits else 0.5 if rule.scoring == "sqrtsoftplus" else 0.25
    rounding = 2 * epsilon * last.abs() + slope * 32 * epsilon * logits.abs().amax(dim=-1)
    tied = last - next_best <= rounding
    return tied | is_near_jump(logits, rule, int(places.max()), 32 * epsilon)


def is_near_jump(
    logits: torch.Tensor, rule: RouterRule, top_k: int, resolution: float
) -> torch.Tensor:
    """Find the tokens whose gates jump if logits change a little.

    Gates of most rules follow logits smoothly as long as the experts stay the same. Those of
    `sparsemixer` do not: one more expert at the edge of the band takes half of a gate, and of
    two experts in the band the first has half a gate and the second a whole one.

    Args:
        logits: float32 [tokens, experts].
        rule: How the family chooses.
        top_k: Experts per token.
        resolution: Relative change of the logits, in (0, 1).

    Returns:
        bool [tokens].
    """
    found = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if rule.scoring != "sparsemixer":
        return found
    left = logits
    for _ in range(top_k):
        best, index = left.max(dim=-1, keepdim=True)
        left = left.scatter(-1, index, float("-inf"))
        band = (best - left) / torch.maximum(left.abs(), best)
        at_edge = (band - 2 * rule.jitter).abs() <= resolution
        found |= ((band <= resolution) | at_edge).any(dim=-1)
    return found


def _score(logits: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    if rule.scoring == "sigmoid":
        return logits.sigmoid()
    if rule.scoring == "sqrtsoftplus":
        return torch.nn.functional.softplus(logits).sqrt()
    if rule.softmax_over == "top_k":
        return logits
    return torch.nn.functional.softmax(logits, dim=-1)


def _choice(
    logits: torch.Tensor, scores: torch.Tensor, bias: torch.Tensor | None, rule: RouterRule
) -> torch.Tensor:
    """Return what the experts are chosen by."""
    choice = logits if rule.bias_on == "logits" else scores
    if bias is not None:
        choice = choice + bias.float()
    return _mask_groups(choice, rule) if rule.limits_groups else choice


def _mask_groups(choice: torch.Tensor, rule: RouterRule) -> torch.Tensor:
    """Put the experts outside the best groups out of reach."""
    grouped = choice.reshape(*choice.shape[:-1], rule.n_group, -1)
    if rule.group_score == "top2":
        group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
    else:
        group_scores = grouped.amax(dim=-1)
    best = torch.topk(group_scores, rule.topk_group, dim=-1, sorted=False).indices
    mask = torch.zeros_like(group_scores).scatter(-1, best, 1.0).bool()
    return grouped.masked_fill(~mask.unsqueeze(-1), rule.group_fill).flatten(-2)


def _gate(
    scores: torch.Tensor,
    rule: RouterRule,
    used: torch.Tensor | None,
    shared: torch.Tensor | None,
) -> torch.Tensor:
    if rule.softmax_of_chosen:
        if used is not None:
            scores = scores.masked_fill(~used, float("-inf"))
        return torch.nn.functional.softmax(scores, dim=-1)
    if rule.renormalise:
        kept = scores if used is None else torch.where(used, scores, torch.zeros_like(scores))
        total = kept.sum(dim=-1, keepdim=True)
        if shared is not None:
            total = total + shared.sum(dim=-1, keepdim=True)
        if rule.sum_epsilon:
            total = total + rule.sum_epsilon
        scores = scores / total
    return scores
