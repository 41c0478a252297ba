from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.prune.merge import align, merge_experts

HIDDEN = 6


def random_expert(seed: int, intermediate: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(2 * intermediate, HIDDEN, generator=generator),
        torch.randn(HIDDEN, intermediate, generator=generator),
    )


def permute(
    expert: tuple[torch.Tensor, torch.Tensor], order: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = expert[0].chunk(2)
    return torch.cat((gate[order], up[order])), expert[1][:, order]


def run(expert: tuple[torch.Tensor, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    gate, up = (hidden @ expert[0].T).chunk(2, dim=-1)
    return (torch.nn.functional.silu(gate) * up) @ expert[1].T


def likeness(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """What UNCURL maximises: inner products of whole matrices."""
    return float(
        sum((a.double() * b.double()).sum() for a, b in zip(first, second, strict=True))
    )


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), order=st.permutations(range(7)), share=st.floats(0.01, 0.99))
def test_two_orders_of_one_expert_merge_to_that_expert(
    seed: int, order: list[int], share: float
) -> None:
    expert = random_expert(seed, 7)
    other = permute(expert, order)

    gate_up, down = merge_experts(
        torch.stack((expert[0], other[0])),
        torch.stack((expert[1], other[1])),
        (share, 1 - share),
        reference=0,
    )

    assert torch.equal(gate_up, expert[0])
    assert torch.equal(down, expert[1])


@settings(max_examples=25, deadline=None)
@given(first=st.integers(0, 1000), second=st.integers(1001, 2000))
def test_alignment_is_the_best_of_all_permutations(first: int, second: int) -> None:
    reference, expert = random_expert(first, 5), random_expert(second, 5)

    aligned = align(*reference, *expert)

    best = max(
        likeness(reference, permute(expert, list(order)))
        for order in itertools.permutations(range(5))
    )
    assert likeness(reference, aligned) == pytest.approx(best, rel=1e-12)


def test_alignment_changes_the_order_and_not_the_function() -> None:
    expert, hidden = random_expert(1, 16), torch.randn(9, HIDDEN)

    aligned = align(*random_expert(0, 16), *expert)

    assert not torch.equal(aligned[1], expert[1])
    torch.testing.assert_close(run(aligned, hidden), run(expert, hidden), rtol=1e-4, atol=1e-5)


def test_merging_averages_what_was_aligned() -> None:
    experts = [random_expert(seed, 4) for seed in range(3)]
    shares = (0.2, 0.5, 0.3)

    gate_up, down = merge_experts(
        torch.stack([e[0] for e in experts]), torch.stack([e[1] for e in experts]), shares, 1
    )

    aligned = [align(*experts[1], *e) for e in (experts[0], experts[1], experts[2])]
    assert torch.equal(aligned[1][0], experts[1][0])
    torch.testing.assert_close(
        gate_up, sum(share * a[0] for share, a in zip(shares, aligned, strict=True))
    )
    torch.testing.assert_close(
        down, sum(share * a[1] for share, a in zip(shares, aligned, strict=True))
    )
