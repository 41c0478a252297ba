from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.apply.merge import align, merge_experts

HIDDEN = 6


Expert = dict[str, torch.Tensor]


def random_expert(seed: int, intermediate: int, *, biased: bool = False) -> Expert:
    generator = torch.Generator().manual_seed(seed)
    expert = {
        "gate_up_proj": torch.randn(2 * intermediate, HIDDEN, generator=generator),
        "down_proj": torch.randn(HIDDEN, intermediate, generator=generator),
    }
    if biased:
        expert["gate_up_proj_bias"] = torch.randn(2 * intermediate, generator=generator)
        expert["down_proj_bias"] = torch.randn(HIDDEN, generator=generator)
    return expert


def permute(expert: Expert, order: list[int]) -> Expert:
    def halves(rows: torch.Tensor) -> torch.Tensor:
        gate, up = rows.chunk(2)
        return torch.cat((gate[order], up[order]))

    return {
        name: part[:, order]
        if name == "down_proj"
        else part
        if name == "down_proj_bias"
        else halves(part)
        for name, part in expert.items()
    }


def stack(*experts: Expert) -> Expert:
    return {name: torch.stack([expert[name] for expert in experts]) for name in experts[0]}


def run(expert: Expert, hidden: torch.Tensor) -> torch.Tensor:
    units = hidden @ expert["gate_up_proj"].T + expert.get("gate_up_proj_bias", 0)
    gate, up = units.chunk(2, dim=-1)
    output = (torch.nn.functional.silu(gate) * up) @ expert["down_proj"].T
    return output + expert.get("down_proj_bias", 0)


def likeness(first: Expert, second: Expert) -> float:
    """What UNCURL maximises: inner products of whole matrices."""
    return float(sum((first[n].double() * second[n].double()).sum() for n in first))


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    order=st.permutations(range(7)),
    share=st.floats(0.01, 0.99),
    biased=st.booleans(),
)
def test_two_orders_of_one_expert_merge_to_that_expert(
    seed: int, order: list[int], share: float, biased: bool
) -> None:
    expert = random_expert(seed, 7, biased=biased)

    merged = merge_experts(
        stack(expert, permute(expert, order)), (share, 1 - share), reference=0
    )

    assert all(torch.equal(merged[name], expert[name]) for name in expert)


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 1000), second=st.integers(1001, 2000), biased=st.booleans())
def test_alignment_is_the_best_of_all_permutations(
    first: int, second: int, biased: bool
) -> None:
    reference = random_expert(first, 5, biased=biased)
    expert = random_expert(second, 5, biased=biased)

    aligned = align(reference, expert)

    best = max(
        likeness(reference, permute(expert, list(order)))
        for order in itertools.permutations(range(5))
    )
    assert likeness(reference, aligned) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_alignment_changes_the_order_and_not_the_function(biased: bool) -> None:
    expert, hidden = random_expert(1, 16, biased=biased), torch.randn(9, HIDDEN)

    aligned = align(random_expert(0, 16, biased=biased), expert)

    assert not torch.equal(aligned["down_proj"], expert["down_proj"])
    torch.testing.assert_close(run(aligned, hidden), run(expert, hidden), rtol=1e-4, atol=1e-5)


def test_merging_averages_what_was_aligned() -> None:
    experts = [random_expert(seed, 4, biased=True) for seed in range(3)]
    shares = (0.2, 0.5, 0.3)

    merged = merge_experts(stack(*experts), shares, 1)

    aligned = [align(experts[1], expert) for expert in experts]
    assert torch.equal(aligned[1]["gate_up_proj"], experts[1]["gate_up_proj"])
    for name, part in merged.items():
        torch.testing.assert_close(
            part, sum(share * a[name] for share, a in zip(shares, aligned, strict=True))
        )
