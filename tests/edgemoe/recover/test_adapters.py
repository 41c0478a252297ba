from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from edgemoe.errors import RecoveryError
from edgemoe.models import FAMILIES, adapt_model
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.tiny import tiny_config, tiny_model
from edgemoe.recover.adapters import add_adapters, linear_names
from edgemoe.recover.options import RecoverOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models import MoeModel

OPTIONS = RecoverOptions(rank=4, alpha=8.0)


def disturb(parameters: dict[str, nn.Parameter]) -> None:
    """Give the adapters an effect, as training does: B is zero at first."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in parameters.items():
            # What a layer does not read through its own call has no gradient, and stays.
            if ".lora_B." in name and parameter.grad is not None:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_adapters_change_nothing_at_first_and_merge_to_what_they_computed(
    family: str, logits_of: Callable[[MoeModel], torch.Tensor]
) -> None:
    model = adapt_model(tiny_model(tiny_config(family)))
    for layer in model.layers[::2]:
        factor_layer(layer, split_by_svd(layer, 12))
    names, before = set(model.model.state_dict()), logits_of(model)

    adapters = add_adapters(model, OPTIONS)

    torch.testing.assert_close(logits_of(model), before, rtol=1e-5, atol=1e-5)
    ids = torch.arange(3, 43).reshape(2, 20)
    model.model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    disturb(adapters.parameters)
    adapted = logits_of(model)
    adapters.merge()
    merged = logits_of(model)
    assert set(model.model.state_dict()) == names
    assert (adapted - before).abs().max() > 0.01
    torch.testing.assert_close(merged, adapted, rtol=1e-3, atol=2e-3)


def test_every_expert_tensor_and_linear_layer_gets_the_rank_asked_for() -> None:
    # Of its dense and shared layers' names peft would make experts, of twice the rank.
    model = adapt_model(tiny_model(tiny_config("glm4_moe")))
    linear = linear_names(model)

    adapters = add_adapters(model, OPTIONS)

    assert "model.layers.0.mlp.gate_proj" in linear
    assert "model.layers.1.mlp.shared_experts.up_proj" in linear
    assert "model.layers.1.self_attn.q_proj" in linear
    assert not any(name.endswith(".gate") or name == "lm_head" for name in linear)
    experts = [name for name in adapters.parameters if ".mlp.experts." in name]
    assert len(experts) == 2 * 2 * 3
    assert len(adapters.parameters) == len(experts) + 2 * len(linear)
    for name, parameter in adapters.parameters.items():
        count = 8 if name in experts else 1
        axis = 0 if ".lora_A." in name else 1
        assert parameter.shape[axis] == 4 * count, name
    assert adapters.copied_bytes == 3 * 8 * 3 * 32 * 64 * 4


def test_the_draw_depends_on_the_seed_alone() -> None:
    def draw(seed: int) -> dict[str, torch.Tensor]:
        torch.rand(3)
        model = adapt_model(tiny_model(tiny_config("mixtral")))
        options = RecoverOptions(rank=4, alpha=8.0, seed=seed)
        return {k: v.detach() for k, v in add_adapters(model, options).parameters.items()}

    first, again, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("factored", [False, True])
def test_a_single_transposed_expert_is_refused_by_name(factored: bool) -> None:
    model = adapt_model(tiny_model(tiny_config("gpt_oss", num_experts_per_tok=1)))
    for layer in model.layers:
        layer.keep([0])
        if factored:
            factor_layer(layer, split_by_svd(layer, 3))

    with pytest.raises(RecoveryError, match=r"layers\.0\.mlp must have two or more experts"):
        add_adapters(model, OPTIONS)
