"""Policies against brute force, and against the whole model run from its first layer on."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.allocate.alloc_l import share_out
from edgemoe.allocate.budget import spend_evenly
from edgemoe.allocate.registry import POLICIES, allocate
from edgemoe.allocate.usage import count_experts
from edgemoe.errors import AllocationError
from edgemoe.models import limit_k
from edgemoe.models.k_policy import following, put_k_policy

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.oracle.oracle import LayerOracle


@given(
    st.lists(st.lists(st.floats(1, 100), min_size=1, max_size=4), min_size=1, max_size=4),
    st.data(),
)
def test_no_way_of_spending_the_budget_is_better(
    needs: list[list[float]], data: st.DataObject
) -> None:
    budget = data.draw(st.integers(len(needs), sum(map(len, needs))))
    counts = share_out(needs, budget)
    assert sum(counts) == budget
    ways = itertools.product(*(range(1, len(need) + 1) for need in needs))
    best = min(
        math.fsum(need[k - 1] for need, k in zip(needs, way, strict=True))
        for way in ways
        if sum(way) == budget
    )
    found = math.fsum(need[k - 1] for need, k in zip(needs, counts, strict=True))
    assert found == pytest.approx(best, rel=1e-12)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=8), st.floats(0, 1))
def test_an_even_share_spends_all_and_leaves_no_layer_two_behind(
    most: list[int], share: float
) -> None:
    mean = 1 + share * (sum(most) / len(most) - 1)
    counts = spend_evenly(mean, most)
    assert sum(counts) == math.floor(mean * len(most) + 1e-6)
    for mine, mine_most in zip(counts, most, strict=True):
        assert 1 <= mine <= mine_most
        assert mine == mine_most or mine >= max(counts) - 1


def perplexity(oracle: LayerOracle) -> float:
    losses: list[float] = []
    with torch.no_grad():
        for window in oracle.windows:
            ids = torch.tensor([window.ids])
            logits = oracle.moe.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            scores = torch.log_softmax(logits, dim=-1)
            losses += scores.gather(1, ids[0, 1:, None]).ravel().neg().tolist()
    return math.exp(np.mean(losses))


@pytest.mark.parametrize("deeper", ["one", "all"])
def test_alloc_l_finds_what_trying_every_table_finds(
    make_oracle: Callable[..., LayerOracle], deeper: str
) -> None:
    oracle = make_oracle("mixtral", num_hidden_layers=3)
    layers = oracle.moe.layers
    needs: list[list[float]] = []
    for place in range(len(layers)):
        after = [1 if deeper == "one" else 3] * (len(layers) - place - 1)
        needs.append([])
        for k in (1, 2, 3):
            with limit_k(oracle.moe, [*[3] * place, k, *after]):
                needs[-1].append(perplexity(oracle))
    tables = [t for t in itertools.product((1, 2, 3), repeat=3) if sum(t) == 6]
    best = min(tables, key=lambda t: sum(n[k - 1] for n, k in zip(needs, t, strict=True)))
    policy = allocate(oracle, "alloc-l", task="t", mean_k=2, options={"deeper": deeper})
    assert tuple(rule.slots for rule in policy.rules) == best
    assert all(rule.is_fixed for rule in policy.rules)


@pytest.mark.parametrize("family", ["glm4_moe", "mixtral", "qwen2_moe"])
@pytest.mark.parametrize(("mean_k", "k_max"), [(1.5, 0), (2.5, 0), (3.5, 6)])
def test_top_p_reaches_the_mean_that_was_asked_for(
    make_oracle: Callable[..., LayerOracle], family: str, mean_k: float, k_max: int
) -> None:
    oracle = make_oracle(family)
    options = {"k_max": k_max}
    policy = allocate(oracle, "top-p", task="t", mean_k=mean_k, options=options)
    (share,) = {rule.top_p for rule in policy.rules}
    with following(oracle.moe, policy):
        counts = count_experts(oracle.moe, oracle.windows)
    assert counts.shape == (oracle.tokens, len(oracle.moe.layers))
    # The first layer sees what it saw; the others a stream that the policy changed.
    assert counts.mean() == pytest.approx(mean_k, abs=0.15)
    assert counts.max() <= (k_max or 3)
    more = allocate(oracle, "top-p", task="t", options={"p": share, "k_max": k_max})
    assert [rule.top_p for rule in more.rules] == [share] * len(policy.rules)


def test_fixed_takes_two_thirds_a_mean_or_a_table(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral", num_hidden_layers=3)

    def slots(**options: Any) -> list[int]:
        mean = options.pop("mean_k", None)
        made = allocate(oracle, "fixed", task="t", mean_k=mean, options=options)
        return [rule.slots for rule in made.rules]

    assert slots() == [2, 2, 2]
    assert slots(mean_k=4 / 3) == [2, 1, 1]
    assert slots(k="5") == [5, 5, 5]
    assert slots(k="1, 3,2") == [1, 3, 2]


@pytest.mark.parametrize(
    ("policy", "asked", "message"),
    [
        ("fixed", {"options": {"k": "1,2"}}, "one for each of the 3 MoE layers"),
        ("fixed", {"options": {"k": "0"}}, r"integers in \[1, inf\)"),
        ("fixed", {"options": {"k": "9"}}, "between 1 and 8 experts"),
        ("fixed", {"options": {"k": "1"}, "mean_k": 2}, "a table or a mean"),
        ("fixed", {"mean_k": 0.5}, r"--mean-k must be in \[1, 8\]"),
        ("alloc-l", {"mean_k": 3.5}, r"--mean-k must be in \[1, 3\]"),
        ("alloc-l", {"options": {"deeper": "none"}}, "deeper must be one of"),
        ("top-p", {"options": {"p": 0.5}, "mean_k": 2}, "a share or a mean"),
        ("top-p", {"options": {"p": 1.5}}, r"p must be in \(0, 1\]"),
        ("top-p", {"mean_k": math.nan}, "--mean-k must be"),
        ("top-p", {"seed": -1}, "seed must be"),
        ("ada-k", {"seed": 1 << 32}, "seed must be"),
        ("top-p", {"options": {"p": 1e-50}}, r"p must be in \(0, 1\]"),
        ("top-p", {"options": {"tokens": 0}}, r"tokens must be in \[1, inf\), got 0"),
        ("alloc-l", {"options": {"tokens": 0}}, r"tokens must be in \[1, inf\), got 0"),
        ("alloc-l", {"options": {"tokens": 1}}, "two tokens of a line or more"),
        ("ada-q", {}, "policy must be one of"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_oracle: Callable[..., LayerOracle], policy: str, asked: dict[str, Any], message: str
) -> None:
    oracle = make_oracle("mixtral", num_hidden_layers=3)
    with pytest.raises(AllocationError, match=message):
        allocate(oracle, policy, task="t", **asked)


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_router_of_one_expert_stays_at_one(
    make_oracle: Callable[..., LayerOracle], policy: str
) -> None:
    oracle = make_oracle("mixtral", num_experts_per_tok=1)
    options = {"steps": 1, "k_max": 1} if policy == "ada-k" else {}
    made = allocate(oracle, policy, task="t", options=options)
    with following(oracle.moe, made):
        assert set(count_experts(oracle.moe, oracle.windows).ravel().tolist()) == {1}


def test_two_thirds_of_two_are_not_two(make_oracle: Callable[..., LayerOracle]) -> None:
    oracle = make_oracle("mixtral", num_experts_per_tok=2)
    made = allocate(oracle, "fisher", task="t")
    with following(oracle.moe, made):
        counts = count_experts(oracle.moe, oracle.windows)
    assert counts.mean() == pytest.approx(4 / 3, abs=0.1)


def test_an_endless_perplexity_is_told(make_oracle: Callable[..., LayerOracle]) -> None:
    oracle = make_oracle("mixtral")
    with torch.no_grad():
        oracle.moe.model.lm_head.weight.mul_(1e6)
    with pytest.raises(AllocationError, match="finite perplexity"):
        allocate(oracle, "alloc-l", task="t")


def test_a_model_with_a_policy_gets_no_other(make_oracle: Callable[..., LayerOracle]) -> None:
    oracle = make_oracle("mixtral")
    put_k_policy(oracle.moe, allocate(oracle, "fixed", task="t"))
    with pytest.raises(AllocationError, match="no k policy yet, got one with fixed"):
        allocate(oracle, "fixed", task="t")
