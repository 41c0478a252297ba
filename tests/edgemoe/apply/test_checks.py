"""What a plan asks beyond what a router can do is refused, in memory and streamed."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from edgemoe.apply.in_memory import apply_plan
from edgemoe.apply.streamed import apply_streamed
from edgemoe.errors import PlanError
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.models import load_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all
from edgemoe.plans.plan import LayerPlan, MergedExpert

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("road", ["whole", "streamed"])
def test_a_token_uses_no_more_than_the_groups_within_its_reach_hold(
    tmp_path: Path, road: str
) -> None:
    # Four groups of four experts, of which a token may use two: of two kept in each, four.
    checkpoint = Checkpoint(write_tiny_checkpoint("deepseek_v3", tmp_path / "moe"))
    kept = tuple(MergedExpert(members=(4 * group + n,)) for group in range(4) for n in (0, 1))
    whole = keep_all(checkpoint.shape)
    plan = replace(
        whole, layers=tuple(LayerPlan(layer=one.layer, experts=kept) for one in whole.layers)
    )

    def asking(slots: int) -> KPolicy:
        layers = tuple(one.layer for one in plan.layers)
        return KPolicy(
            name="fixed", layers=layers, rules=tuple(KRule(slots=slots) for _ in layers)
        )

    def carry_out(slots: int) -> None:
        asked = replace(plan, k_policy=asking(slots))
        if road == "whole":
            apply_plan(load_model(checkpoint), asked)
        else:
            apply_streamed(checkpoint, asked, tmp_path / f"out-{slots}")

    carry_out(4)
    with pytest.raises(PlanError, match=r"layer 1: .* at most 4 .* of the 8 .* got k=5"):
        carry_out(5)
    assert not (tmp_path / "out-5").exists()
