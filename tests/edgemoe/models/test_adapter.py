from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models import adapt_model
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from collections.abc import Callable

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")

MOE_LAYERS = {"glm4_moe": [1, 2], "qwen2_moe": [0, 2], "mixtral": [0, 1, 2]}


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_are_found_and_dense_ones_left_out(
    make_model: Callable[..., Any], family: str
) -> None:
    model = adapt_model(make_model(family))

    assert [layer.index for layer in model.layers] == MOE_LAYERS[family]
    assert [layer.name for layer in model.layers] == [
        f"model.layers.{index}.mlp" for index in MOE_LAYERS[family]
    ]
    for layer in model.layers:
        assert (layer.num_experts, layer.top_k) == (8, 3)
        assert (layer.hidden_size, layer.intermediate_size) == (32, 16)
        assert layer.rule is not None
        assert (layer.correction_bias is not None) == (family == "glm4_moe")
    assert not any(parameter.requires_grad for parameter in model.model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_one_by_one_add_up_to_the_experts_module(
    make_model: Callable[..., Any], family: str
) -> None:
    layer = adapt_model(make_model(family)).layers[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    indices = torch.tensor([[0, 5, 2]] * 5)
    weights = torch.rand(5, 3, generator=torch.Generator().manual_seed(1))

    expected = layer.experts(hidden, indices, weights)

    parts = [
        weights[:, slot, None] * layer.expert_output(expert, hidden)
        for slot, expert in enumerate((0, 5, 2))
    ]
    torch.testing.assert_close(sum(parts), expected, rtol=1e-5, atol=1e-6)


def test_an_unknown_family_is_refused_with_those_supported() -> None:
    with pytest.raises(FamilyError, match=r"got 'llama': it has no experts.*docs/families.md"):
        find_family("llama")


def test_a_model_without_moe_layers_is_refused(make_model: Callable[..., Any]) -> None:
    with pytest.raises(CheckpointError, match="must have an MoE layer"):
        adapt_model(make_model("glm4_moe", first_k_dense_replace=3))


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("glm4_moe", {"num_experts_per_tok": 0}),
        ("glm4_moe", {"n_group": 3}),
        ("mixtral", {"num_experts_per_tok": 9}),
    ],
)
def test_a_routing_that_makes_no_sense_is_refused(
    make_model: Callable[..., Any], family: str, changes: dict[str, int]
) -> None:
    with pytest.raises(CheckpointError, match=r"router .* must run with 8 experts"):
        adapt_model(make_model(family, **changes))


@pytest.mark.parametrize("broken", ["rows", "bias", "too_few"])
def test_experts_and_router_rows_cannot_part(
    make_model: Callable[..., Any], broken: str
) -> None:
    layer = adapt_model(make_model("glm4_moe")).layers[0]
    before = layer.tensors()
    tensors = layer.select(range(2 if broken == "too_few" else 4))
    if broken == "rows":
        tensors["gate.weight"] = before["gate.weight"]
    if broken == "bias":
        del tensors["gate.e_score_correction_bias"]

    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp"):
        layer.replace(tensors)

    assert all(layer.tensor(name) is tensor for name, tensor in before.items())
