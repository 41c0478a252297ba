"""Every family of the support table, on tiny random checkpoints."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Qwen3_5MoeConfig, Qwen3_5MoeForConditionalGeneration

from edgemoe.apply.in_memory import apply_plan
from edgemoe.errors import FamilyError
from edgemoe.models import (
    FAMILIES,
    adapt_model,
    load_model,
    observe,
    read_shape,
    save_model,
)
from edgemoe.models.discovery import build_skeleton, discover
from edgemoe.models.layers.factored import factor_layer, ranks_of, split_by_svd
from edgemoe.models.registry import find_family
from edgemoe.models.routing.routers import select
from edgemoe.models.shapes import Ranks
from edgemoe.models.tiny import VOCAB_SIZE, tiny_config, tiny_model, write_tiny_checkpoint
from edgemoe.prune import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models import MoeLayer, MoeModel, Routing

# Its routers choose experts by token.
WITHOUT_RULE = {"deepseek_v4"}
# The layers in the order in which they run, where that is not once each.
RUNS_TWICE = {"inkling2_loop_text": [0, 1, 2, 1, 2, 3]}
NO_GROUPS = {"n_group": 1, "topk_group": 1}


def random_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model: MoeModel) -> torch.Tensor:
    logits: torch.Tensor = model.model(input_ids=random_ids(), use_cache=False).logits
    return logits


def ragged_plan(model: MoeModel) -> Plan:
    """Drop a different number of experts in each layer, and merge two where that is allowed."""
    layers = []
    for position, layer in enumerate(model.layers):
        shape = layer.shape
        if shape.n_group > 1:
            size = shape.num_experts // shape.n_group
            kept = max(shape.min_group_size, size - position % 2)
            experts = [
                MergedExpert(members=(group * size + place,))
                for group in range(shape.n_group)
                for place in range(kept)
            ]
        else:
            experts = [MergedExpert(members=(expert,)) for expert in range(1 + position, 7)]
            experts.append(MergedExpert(members=(0, 7), weights=(1.0, 3.0)))
        layers.append(LayerPlan(layer=layer.index, experts=tuple(experts)))
    return Plan(method="by-hand", layers=tuple(layers), checkpoint_sha256=model.sha256)


def assert_same_model(found: MoeModel, expected: MoeModel) -> None:
    """Compare weights bit by bit; products round differently on memory mapped from a file."""
    weights = expected.model.state_dict()
    loaded = found.model.state_dict()
    assert loaded.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(loaded[name], tensor), name
    torch.testing.assert_close(logits_of(found), logits_of(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rule_explains_what_the_router_does(family: str) -> None:
    model = adapt_model(tiny_model(tiny_config(family), seed=1))
    seen: list[tuple[MoeLayer, Routing]] = []

    with observe(model, lambda layer, _, routing, __: seen.append((layer, routing))):
        logits_of(model)

    in_order = [layer.index for layer in model.layers]
    assert [layer.index for layer, _ in seen] == RUNS_TWICE.get(family, in_order)
    assert any(layer.rule is None for layer in model.layers) == (family in WITHOUT_RULE)
    for layer, theirs in seen:
        if layer.rule is None:
            continue
        ours = select(
            theirs.logits,
            layer.correction_bias,
            layer.rule,
            layer.top_k,
            expert_scale=layer.expert_scale,
        )
        # The last column is that of slots that are not used.
        gates = torch.zeros(2, len(theirs.weights), layer.num_experts + 1)
        gates[0].scatter_(1, theirs.indices, theirs.weights.float())
        gates[1].scatter_(1, ours.indices, ours.weights)
        torch.testing.assert_close(gates[1], gates[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_one_by_one_add_up_to_the_experts_module(family: str) -> None:
    layer = adapt_model(tiny_model(tiny_config(family))).layers[0]
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(5, layer.hidden_size, generator=draw)
    weights = torch.rand(5, 3, generator=draw)

    with torch.no_grad():
        found = layer.experts(hidden, torch.tensor([[0, 5, 2]] * 5), weights)
        parts = [
            weights[:, slot, None] * layer.expert_output(expert, hidden)
            for slot, expert in enumerate((0, 5, 2))
        ]

    torch.testing.assert_close(sum(parts), found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_layers_of_different_sizes_reload_bit_by_bit(
    family: str, tmp_path: Path
) -> None:
    write_tiny_checkpoint(family, tmp_path / "whole")
    model = load_model(tmp_path / "whole")
    before = logits_of(model)
    for layer in model.layers:
        layer.keep(range(layer.num_experts))
    assert torch.equal(logits_of(model), before)
    plan = ragged_plan(model)

    small = apply_plan(model, plan)
    (tmp_path / "small").mkdir()
    save_model(small, tmp_path / "small", source=tmp_path / "whole")
    again = load_model(tmp_path / "small")

    after = logits_of(small)
    assert again.experts_per_layer == plan.experts_per_layer
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)
    assert_same_model(again, small)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_factored_experts_of_full_rank_say_the_same_and_reload(
    family: str, tmp_path: Path
) -> None:
    write_tiny_checkpoint(family, tmp_path / "whole")
    model = load_model(tmp_path / "whole")
    before = logits_of(model)
    first = model.layers[0]

    factor_layer(first, split_by_svd(first, min(first.hidden_size, 64)))
    (tmp_path / "full").mkdir()
    save_model(model, tmp_path / "full")

    torch.testing.assert_close(logits_of(model), before, rtol=1e-3, atol=1e-3)
    assert_same_model(load_model(tmp_path / "full"), model)
    model = load_model(tmp_path / "whole")
    for position, layer in enumerate(model.layers[1:], start=2):
        factor_layer(layer, split_by_svd(layer, position))
        if layer.shape.n_group == 1:
            layer.keep(range(position, 8))
    assert ranks_of(model.layers[1]) == Ranks(2, 2)
    (tmp_path / "small").mkdir()
    save_model(model, tmp_path / "small")
    again = load_model(tmp_path / "small")
    assert_same_model(again, model)
    assert read_shape(tmp_path / "small") == model.shape
    stored = json.loads((tmp_path / "small" / "config.json").read_text())["edgemoe"]
    assert stored["ranks_per_layer"][:2] == [None, [2, 2]]


def test_the_language_part_of_a_vision_language_checkpoint_opens(tmp_path: Path) -> None:
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2}
    config = Qwen3_5MoeConfig(
        text_config=tiny_config("qwen3_5_moe_text").to_dict(),
        vision_config={**vision, "out_hidden_size": 64},
    )
    torch.manual_seed(0)
    both = Qwen3_5MoeForConditionalGeneration(config).eval()
    both.save_pretrained(tmp_path)

    model = load_model(tmp_path)

    assert model.family == "qwen3_5_moe_text"
    assert model.experts_per_layer == (8, 8, 8, 8)
    with torch.no_grad():
        assert torch.equal(logits_of(model), both(input_ids=random_ids()).logits)


def test_a_vision_language_model_without_a_language_class_is_refused_by_name() -> None:
    with pytest.raises(
        FamilyError, match=r"got 'qwen3_vl_moe': transformers .* has no language"
    ):
        find_family("qwen3_vl_moe")


def test_an_unknown_way_to_build_layers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second router in a block would be pruned by luck only."""
    family = find_family("mixtral")
    build = family.causal_lm.__init__

    def with_two_routers(self: Any, config: Any) -> None:
        build(self, config)
        block = self.model.layers[0].mlp
        block.second = type(block.gate)(config)

    monkeypatch.setattr(family.causal_lm, "__init__", with_two_routers)

    with pytest.raises(FamilyError, match="must have one router beside its experts"):
        discover(family, tiny_config("mixtral", max_position_embeddings=77))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"num_experts_per_tok": 8}, (1, 8)),
        ({"n_group": 2, "topk_group": 2}, (2, 4)),
        ({"n_group": 4, "topk_group": 2, "n_routed_experts": 16}, (4, 8)),
    ],
)
def test_how_few_experts_a_router_runs_with_is_tried(
    changes: dict[str, int], expected: tuple[int, int]
) -> None:
    config = tiny_config("deepseek_v3", **{"n_routed_experts": 8, **NO_GROUPS, **changes})

    shape = adapt_model(build_skeleton(find_family("deepseek_v3"), config)).layers[0].shape

    assert (shape.n_group, shape.min_experts) == expected
