"""Find a router's rule: run it on random weights, and keep the rule that explains it.

A rule counts only when it gives the experts and the gates of every probe. So a family whose
router is of a known kind needs no declaration, and one whose router is not is noticed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from edgemoe.errors import CheckpointError
from edgemoe.models.routing.probe import linear
from edgemoe.models.routing.routers import select, weigh_chosen
from edgemoe.models.routing.rule import RouterRule, RouterTensors

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemoe.models.routing.probe import Answer, RouterProbe

_TOLERANCE = 1e-5
# What families add to the sum of gates before they divide by it, the usual first: sigmoids may
# all be zero.
_SOFTMAX_EPSILONS = (0.0, 1e-20, 1e-6)
_OTHER_EPSILONS = (1e-20, 1e-6, 0.0)
_FILLS = (float("-inf"), 0.0)


@dataclass(frozen=True, kw_only=True)
class RouterSpec:
    """Behaviour of a router, as found by probing.

    Attributes:
        top_k: Experts per token.
        rule: How it chooses; None where it follows none of the rules that edgemoe knows.
        by_id: How it weighs experts, where a token's id chooses them: it then has no rule.
        tensors: What it computes with; None where neither is known.
        multiple: The number of experts must be a multiple of this.
        least: Fewest experts, in multiples of `multiple`, with which the router runs.
    """

    top_k: int
    rule: RouterRule | None
    tensors: RouterTensors | None
    multiple: int
    least: int
    by_id: RouterRule | None = None


def identify_router(probe: RouterProbe, experts: int, jitter: float) -> RouterSpec:
    """Find out what a router does.

    Args:
        probe: A copy of it.
        experts: How many experts it has.
        jitter: What config.json says of its noise, which one rule computes with.

    Returns:
        What was found.
    """
    try:
        answer = probe.ask()
    except Exception as error:  # whatever a family raises on settings that make no sense
        raise CheckpointError(
            f"the router of config.json must run with {experts} experts, got: {error}. Correct "
            "its numbers of experts, of experts per token and of groups."
        ) from error
    top_k = answer.indices.shape[-1]
    if top_k < 1:
        raise CheckpointError(
            f"the router of config.json must run with {experts} experts and use at least one "
            f"for each token, got {top_k}. Correct its number of experts per token."
        )
    multiple = _multiple(probe, experts, top_k)
    least = _least(probe, experts, multiple, top_k)
    spec = RouterSpec(top_k=top_k, rule=None, tensors=None, multiple=multiple, least=least)
    for logits, tensors in _logits(probe, answer, experts):
        for correction, scale in _roles(probe, tensors):
            rule = _explain(probe, logits, answer, experts, correction, scale, jitter)
            if rule is None:
                continue
            if multiple > 1 and not rule.limits_groups:
                rule = replace(rule, n_group=multiple, topk_group=multiple)
            if rule.limits_groups:
                # The router runs with less, and then uses experts that it masked.
                needed = rule.n_group * -(-top_k // rule.topk_group)
                least = max(least, -(-needed // multiple))
            rule = replace(rule, min_group_size=least)
            roles = replace(tensors, correction_bias=correction, expert_scale=scale)
            if probe.gate_scale is not None:
                roles = replace(roles, gate_scale=probe.gate_scale[0])
            return replace(spec, rule=rule, tensors=roles, least=least)
    return spec if probe.table is None else _explain_table(probe, answer, spec)


def _explain_table(probe: RouterProbe, answer: Answer, spec: RouterSpec) -> RouterSpec:
    """Find how a router weighs experts that it looks up by a token's id."""
    table, ids = probe.table_rows()
    if probe.rows is None or not torch.equal(table[ids], answer.indices):
        return spec
    logits = linear(probe.hidden, probe.row_weights())
    if not _close(answer.logits, logits):
        return spec
    for choosing in (
        RouterRule(scoring="softmax", renormalise=False),
        RouterRule(scoring="sigmoid", renormalise=False),
        RouterRule(scoring="sqrtsoftplus", renormalise=False),
    ):
        for rule in _gate_rules(choosing):
            found = weigh_chosen(logits, answer.indices, rule, spec.top_k)
            _, order = found.indices.sort(dim=-1)
            _, wanted = answer.indices.sort(dim=-1)
            ratio = answer.weights.gather(-1, wanted) / found.weights.gather(-1, order)
            factor = float(ratio.median())
            if float((ratio / factor - 1).abs().max()) < _TOLERANCE:
                rule = replace(rule, scaling_factor=float(f"{factor:.5g}"))
                tensors = RouterTensors(weight=probe.rows, table=probe.table)
                return replace(spec, by_id=rule, tensors=tensors)
    return spec


def _multiple(probe: RouterProbe, experts: int, top_k: int) -> int:
    """Find how many experts must go at a time for the router to run."""
    if experts == top_k:  # none can go
        return 1
    for step in range(1, experts - top_k + 1):
        if experts % step == 0 and probe.runs_with(experts - step):
            return step
    return experts


def _least(probe: RouterProbe, experts: int, multiple: int, top_k: int) -> int:
    first = -(-top_k // multiple)
    for groups in range(first, experts // multiple + 1):
        if probe.runs_with(groups * multiple):
            return 1 if groups == first else groups
    return experts // multiple


def _logits(
    probe: RouterProbe, answer: Answer, experts: int
) -> Iterator[tuple[torch.Tensor, RouterTensors]]:
    """Yield what the router may choose by, with the tensors that it is made of."""
    if probe.rows is None:
        return
    if answer.projected is not None:
        if answer.projected.shape[-1] == experts + probe.further_rows:
            projection = probe.projection() if answer.transformed else ""
            yield answer.projected, RouterTensors(weight=probe.rows, projection=projection)
        return
    rows = probe.row_weights()
    if rows.shape[0] != experts + probe.further_rows:
        return
    products = linear(probe.hidden, rows)
    if probe.further_rows:
        if _close(answer.logits, products[:, : answer.logits.shape[-1]]):
            yield products, RouterTensors(weight=probe.rows)
        return
    for name, bias in probe.vectors.items():
        if _close(answer.logits, products + bias):
            yield products + bias, RouterTensors(weight=probe.rows, logit_bias=name)
            return
    if _close(answer.logits, products):
        yield products, RouterTensors(weight=probe.rows)


def _roles(
    probe: RouterProbe, tensors: RouterTensors
) -> Iterator[tuple[str | None, str | None]]:
    """Yield the parts that the vectors may play: correction bias and scale of the gates."""
    names = [name for name in probe.vectors if name != tensors.logit_bias]
    yield from itertools.permutations([*names, *[None] * (2 - len(names))], 2)


def _explain(
    probe: RouterProbe,
    logits: torch.Tensor,
    answer: Answer,
    experts: int,
    correction: str | None,
    scale: str | None,
    jitter: float,
) -> RouterRule | None:
    """Return the rule that gives the same experts and gates, if there is one."""
    bias = None if correction is None else probe.vectors[correction]
    scales = None if scale is None else probe.vectors[scale]
    top_k = answer.indices.shape[-1]
    indices = answer.indices
    if probe.further_rows:
        # The family names some expert where it uses none.
        indices = indices.masked_fill(answer.weights == 0, experts)
    wanted, order = indices.sort(dim=-1)
    gates = answer.weights.gather(-1, order)
    if probe.gate_scale is not None:
        gates = gates / probe.gate_scale[1]
    for choosing in _choosing_rules(
        experts, top_k, bias is not None, jitter, probe.further_rows
    ):
        if bias is not None and len(bias) != experts + choosing.idle:
            continue
        routing = select(logits, bias, choosing, top_k)
        if not torch.equal(routing.indices.sort(dim=-1).values, wanted):
            continue
        best: tuple[float, RouterRule] | None = None
        for rule in _gate_rules(choosing):
            routing = select(logits, bias, rule, top_k, expert_scale=scales)
            _, order = routing.indices.sort(dim=-1)
            ratio = (gates / routing.weights.gather(-1, order))[wanted < experts]
            factor = float(ratio.median())
            error = float((ratio / factor - 1).abs().max())
            if error < _TOLERANCE and (best is None or error < 0.5 * best[0]):
                rule = replace(rule, scaling_factor=float(f"{factor:.5g}"))
                best = error, rule
        if best is not None:
            return best[1]
    return None


def _choosing_rules(
    experts: int, top_k: int, biased: bool, jitter: float, further: int
) -> Iterator[RouterRule]:
    """Yield the ways to choose experts, the plain ones first."""
    plain = [
        RouterRule(scoring="softmax", renormalise=False),
        RouterRule(scoring="sigmoid", renormalise=False),
        RouterRule(scoring="sqrtsoftplus", renormalise=False),
    ]
    if further:
        yield from (replace(rule, idle=further) for rule in plain)
        yield RouterRule(scoring="sigmoid", renormalise=True, shared=further)
        return
    if biased:
        plain += [replace(rule, bias_on="logits") for rule in plain]
    else:
        plain.append(RouterRule(scoring="sparsemixer", renormalise=False, jitter=jitter))
        plain.append(RouterRule(scoring="softmax", renormalise=False, softmax_over="top_k"))
    yield from plain
    for groups in range(2, experts + 1):
        if experts % groups:
            continue
        size = experts // groups
        for kept, rule in itertools.product(range(1, groups), plain):
            if rule.scoring == "sparsemixer" or kept * size < top_k:
                continue
            grouped = replace(rule, n_group=groups, topk_group=kept)
            for fill in _FILLS:
                yield replace(grouped, group_score="max", group_fill=fill)
                if size > 1:
                    yield replace(grouped, group_score="top2", group_fill=fill)


def _gate_rules(choosing: RouterRule) -> Iterator[RouterRule]:
    """Yield the ways to compute gates from the same choice."""
    yield choosing
    if choosing.scoring == "sparsemixer" or choosing.softmax_of_chosen or choosing.further_rows:
        return
    epsilons = _SOFTMAX_EPSILONS if choosing.scoring == "softmax" else _OTHER_EPSILONS
    for epsilon in epsilons:
        yield replace(choosing, renormalise=True, sum_epsilon=epsilon)


def _close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and bool(
        torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE)
    )
