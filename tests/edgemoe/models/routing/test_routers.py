from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import CheckpointError
from edgemoe.models import RouterRule, adapt_model, limit_k, route
from edgemoe.models.routing.routers import (
    is_near_jump,
    is_near_tie,
    select,
    weigh_chosen,
)
from edgemoe.models.tiny import tiny_config, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models import Routing

CASES = [
    ("glm4_moe", {}),
    ("glm4_moe", {"norm_topk_prob": True, "routed_scaling_factor": 1.5}),
    ("glm4_moe", {"n_group": 4, "topk_group": 2}),
    ("qwen2_moe", {}),
    ("qwen2_moe", {"norm_topk_prob": True}),
    ("mixtral", {}),
]


def as_sets(weights: torch.Tensor, indices: torch.Tensor, experts: int) -> torch.Tensor:
    """Gates at the place of their expert, so that the order of the slots does not matter."""
    gates = torch.zeros(len(weights), experts + 1)
    return gates.scatter(1, indices, weights)[:, :experts]


@pytest.mark.parametrize(("family", "changes"), CASES)
def test_route_equals_the_routers_of_transformers(
    make_model: Callable[..., Any], family: str, changes: dict[str, Any]
) -> None:
    model: Any = adapt_model(make_model(family, **changes))
    generator = torch.Generator().manual_seed(1)
    for layer in model.layers:
        hidden = torch.randn(200, layer.hidden_size, generator=generator)
        logits, weights, indices = layer.router(hidden)

        ours = route(
            hidden, layer.router_weight, layer.correction_bias, layer.rule, layer.top_k
        )

        torch.testing.assert_close(ours.logits, logits, rtol=0, atol=0)
        torch.testing.assert_close(
            as_sets(ours.weights, ours.indices, 8),
            as_sets(weights, indices, 8),
            rtol=1e-6,
            atol=0,
        )


def route_by_hand(
    logits: list[float], bias: list[float], rule: RouterRule, top_k: int, cap: int
) -> dict[int, float]:
    """The definition, one token at a time, in float64."""
    row = torch.tensor(logits, dtype=torch.float64)
    scores = row.sigmoid() if rule.scoring == "sigmoid" else row.softmax(0)
    choice = scores + torch.tensor(bias, dtype=torch.float64)
    best = sorted(range(len(logits)), key=lambda e: float(choice[e]), reverse=True)
    used = best[: min(top_k, cap)]
    gates = {expert: float(scores[expert]) for expert in used}
    if rule.renormalise:
        total = sum(gates.values())
        gates = {expert: gate / total for expert, gate in gates.items()}
    return {expert: gate * rule.scaling_factor for expert, gate in gates.items()}


@given(
    scoring=st.sampled_from(["softmax", "sigmoid"]),
    renormalise=st.booleans(),
    order=st.permutations(range(6)),
    bias_order=st.permutations(range(6)),
    top_k=st.integers(1, 6),
    cap=st.integers(1, 8),
    symbolic=st.booleans(),
)
def test_a_cap_uses_the_best_and_renormalises_over_them(
    scoring: Any,
    renormalise: bool,
    order: list[int],
    bias_order: list[int],
    top_k: int,
    cap: int,
    symbolic: bool,
) -> None:
    rule = RouterRule(scoring=scoring, renormalise=renormalise, scaling_factor=1.5)
    logits = [0.37 * position for position in order]
    bias = [0.11 * position for position in bias_order]
    k_cap = torch.tensor(cap) if symbolic else cap

    routing = select(torch.tensor([logits]), torch.tensor(bias), rule, top_k, k_cap)

    expected = route_by_hand(logits, bias, rule, top_k, cap)
    found = dict(zip(routing.indices[0].tolist(), routing.weights[0].tolist(), strict=True))
    dropped = found.pop(6, 0.0)
    assert dropped == 0
    assert found == pytest.approx(expected, rel=1e-5)
    assert (routing.indices[0] == 6).sum() == max(0, top_k - cap)


def test_slots_fall_with_the_choice_score_not_with_the_gate() -> None:
    rule = RouterRule(scoring="sigmoid", renormalise=False)
    bias = torch.tensor([0.0, 0.9, 0.0])

    routing = select(torch.tensor([[2.0, 0.0, 1.0]]), bias, rule, 3)

    assert routing.indices.tolist() == [[1, 0, 2]]
    torch.testing.assert_close(routing.weights[0, 0], torch.tensor(0.5))


def test_half_precision_inputs_are_routed_in_float32() -> None:
    rule = RouterRule(scoring="sigmoid", renormalise=False)
    # The logits differ by less than float16 resolves at their size.
    hidden = torch.full((1, 2), 32.0, dtype=torch.float16)
    weight = torch.tensor([[1.0, 1.0], [1.0, 1.0 + 2**-10]], dtype=torch.float16)

    routing = route(hidden, weight, None, rule, 1)

    assert routing.logits.dtype == torch.float32
    assert routing.logits[0, 1] > routing.logits[0, 0]


def test_softmax_over_the_chosen_is_softmax_over_all_renormalised() -> None:
    logits = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    over_all = RouterRule(scoring="softmax", renormalise=True)
    over_chosen = RouterRule(scoring="softmax", renormalise=False, softmax_over="top_k")

    for cap in (None, 2):
        first: Routing = select(logits, None, over_all, 4, cap)
        second: Routing = select(logits, None, over_chosen, 4, cap)
        torch.testing.assert_close(first.weights, second.weights)
        assert torch.equal(first.indices, second.indices)


def test_groups_restrict_the_choice() -> None:
    rule = RouterRule(scoring="sigmoid", renormalise=False, n_group=4, topk_group=2)
    logits = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))

    chosen = select(logits, None, rule, 4).indices

    for row, indices in zip(logits, chosen, strict=True):
        by_group = {g: float(row[2 * g : 2 * g + 2].sigmoid().sum()) for g in range(4)}
        best = sorted(by_group, key=by_group.__getitem__, reverse=True)[:2]
        allowed = set(itertools.chain.from_iterable((2 * g, 2 * g + 1) for g in best))
        assert set(indices.tolist()) == allowed


def test_a_rule_with_more_chosen_groups_than_groups_is_refused() -> None:
    with pytest.raises(CheckpointError, match="topk_group must be in"):
        RouterRule(scoring="sigmoid", renormalise=False, n_group=1, topk_group=2)


@pytest.mark.parametrize("bias", [None, torch.zeros(4)])
@pytest.mark.parametrize(
    "rule",
    [
        RouterRule(scoring="sigmoid", renormalise=False),
        RouterRule(scoring="softmax", renormalise=True),
        RouterRule(scoring="softmax", renormalise=True, softmax_over="top_k"),
    ],
)
def test_near_ties_are_those_at_the_boundary_of_the_choice(
    rule: RouterRule, bias: torch.Tensor | None
) -> None:
    logits = torch.tensor(
        [
            [1.0, 0.5, 0.5, 0.0],  # second and third are equal
            [1.0, 0.5, 0.5 - 1e-7, 0.0],  # or as good as equal
            [1.0, 1.0, 0.5, 0.0],  # both of the equal ones are chosen
            [1.0, 0.5, 0.4, 0.4],  # or neither is
        ]
    )
    assert is_near_tie(logits, bias, rule, 2).tolist() == [True, True, False, False]
    assert not is_near_tie(logits, bias, rule, 4).any()


def test_scores_that_saturate_are_near_ties() -> None:
    rule = RouterRule(scoring="sigmoid", renormalise=False)
    logits = torch.tensor([[30.0, 25.0, 20.0, -5.0]])
    assert is_near_tie(logits, None, rule, 2).all()
    assert not is_near_tie(logits, None, rule, 3).any()


# Families whose tokens may use some groups of experts only; more of them are in the table that
# `make families` writes.
GROUPED = (
    "axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "dots1", "exaone_moe", "glm4_moe",
    "kimi_linear", "mimo_v2_flash", "nemotron_h",
)  # fmt: skip


@pytest.mark.parametrize("family", GROUPED)
@pytest.mark.parametrize(("topk_group", "least"), [(1, 4), (2, 2), (3, 2)])
def test_groups_that_a_token_may_use_hold_all_that_it_uses(
    family: str, topk_group: int, least: int
) -> None:
    given: Any = {"n_group": 4, "topk_group": topk_group, "num_experts_per_tok": 4}
    if family == "deepseek_v2":
        given["topk_method"] = "group_limited_greedy"
    names = {"bailing_hybrid", "exaone_moe", "kimi_linear"}
    given["num_experts" if family in names else "n_routed_experts"] = 16
    layer = adapt_model(tiny_model(tiny_config(family, **given))).layers[0]
    assert layer.shape.least_kept == 4 * least
    with pytest.raises(CheckpointError, match=f"at least {4 * least} experts"):
        layer.keep([4 * group + n for group in range(4) for n in range(least - 1)])
    layer.keep([4 * group + n for group in range(4) for n in range(least)])
    hidden = torch.randn(50, layer.hidden_size, generator=torch.Generator().manual_seed(0))
    _, _, indices = layer.router(hidden)
    groups = indices // least
    assert all(len(set(row)) <= topk_group for row in groups.tolist())


@given(
    seed=st.integers(0, 2**16),
    jitter=st.sampled_from([0.01, 0.05, 0.2]),
    top_k=st.integers(1, 3),
)
def test_gates_that_are_not_near_a_jump_stay_when_logits_change_a_little(
    seed: int, jitter: float, top_k: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(200, 8, generator=draw)
    moved = logits * (1 + 5e-4 * (2 * torch.rand(logits.shape, generator=draw) - 1))
    rule = RouterRule(scoring="sparsemixer", renormalise=False, jitter=jitter)
    near = is_near_jump(logits, rule, top_k, 4e-3)
    before, after = (select(of, None, rule, top_k) for of in (logits, moved))
    assert torch.equal(before.indices[~near], after.indices[~near])
    torch.testing.assert_close(before.weights[~near], after.weights[~near], atol=5e-3, rtol=0)
    # It is no excuse for all tokens.
    assert near.float().mean() < 0.5
    smooth = RouterRule(scoring="softmax", renormalise=True)
    assert not is_near_jump(logits, smooth, top_k, 4e-3).any()


def test_experts_by_id_are_weighed_as_the_router_does_and_capped_as_eager_is() -> None:
    model = adapt_model(tiny_model(tiny_config("deepseek_v4")))
    layer = model.layers[0]
    assert layer.by_id is not None
    ids = torch.randint(3, 96, (1, 40), generator=torch.Generator().manual_seed(1))
    hidden = torch.randn(1, 40, layer.hidden_size, generator=torch.Generator().manual_seed(2))
    router: Any = layer.router
    for cap in range(1, layer.top_k + 1):
        with limit_k(model, cap):
            logits, weights, indices = router(hidden, ids)
        table = layer.tensor("gate.tid2eid")[ids[0]]
        ours = weigh_chosen(logits, table, layer.by_id, cap)
        torch.testing.assert_close(
            as_sets(ours.weights, ours.indices, layer.num_experts),
            as_sets(weights, indices, layer.num_experts),
            rtol=1e-6,
            atol=0,
        )
