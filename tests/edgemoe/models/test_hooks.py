from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.errors import EdgemoeError
from edgemoe.models import adapt_model, limit_k, observe, route

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models import MoeLayer, Routing

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("family", FAMILIES)
def test_limited_k_equals_summing_the_used_experts(
    make_model: Callable[..., Any],
    token_ids: torch.Tensor,
    family: str,
    implementation: str,
) -> None:
    model: Any = adapt_model(make_model(family))
    model.model.set_experts_implementation(implementation)
    caps = [1, 2, 5][: len(model.layers)]
    outputs: list[tuple[MoeLayer, torch.Tensor, torch.Tensor]] = []
    handles = [
        layer.experts.register_forward_hook(
            lambda _, arguments, output, layer=layer: outputs.append(
                (layer, arguments[0], output)
            )
        )
        for layer in model.layers
    ]
    try:
        with limit_k(model, caps):
            model.model(token_ids)
    finally:
        for handle in handles:
            handle.remove()

    for (layer, hidden, output), cap in zip(outputs, caps, strict=True):
        assert layer.rule is not None
        routing = route(
            hidden, layer.router_weight, layer.correction_bias, layer.rule, layer.top_k, cap
        )
        expected = torch.zeros_like(output)
        for token in range(len(hidden)):
            for expert, gate in zip(
                routing.indices[token], routing.weights[token], strict=True
            ):
                if expert < layer.num_experts:
                    part = layer.expert_output(int(expert), hidden[token : token + 1])
                    expected[token] += gate * part[0]
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def test_limits_end_with_the_block_and_full_k_changes_no_bit(
    make_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model: Any = adapt_model(make_model("glm4_moe"))
    full = model.model(token_ids).logits

    with limit_k(model, 3):
        assert torch.equal(model.model(token_ids).logits, full)
    with limit_k(model, 1):
        assert not torch.allclose(model.model(token_ids).logits, full)
    assert torch.equal(model.model(token_ids).logits, full)


@pytest.mark.parametrize("cap", [0, -1, [1], [1, 0], [1, 2, 3], [1.5, 1], [True, True]])
def test_caps_that_make_no_sense_are_refused(make_model: Callable[..., Any], cap: Any) -> None:
    model: Any = adapt_model(make_model("glm4_moe"))

    with pytest.raises(EdgemoeError, match="k_cap must"), limit_k(model, cap):
        pass


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("limit_first", [True, False])
def test_observers_see_what_the_experts_get(
    make_model: Callable[..., Any], token_ids: torch.Tensor, family: str, limit_first: bool
) -> None:
    model: Any = adapt_model(make_model(family))
    seen: list[tuple[MoeLayer, torch.Tensor, Routing]] = []

    def callback(layer: MoeLayer, hidden: torch.Tensor, routing: Routing, run: Any) -> None:
        seen.append((layer, hidden, routing))
        assert torch.equal(run(1, hidden[:2]), layer.expert_output(1, hidden[:2]))

    with contextlib.ExitStack() as stack:
        if limit_first:
            stack.enter_context(limit_k(model, 2))
        stack.enter_context(observe(model, callback))
        if not limit_first:
            stack.enter_context(limit_k(model, 2))
        model.model(token_ids)
    model.model(token_ids)

    assert [layer.index for layer, _, _ in seen] == [layer.index for layer in model.layers]
    for layer, hidden, routing in seen:
        assert layer.rule is not None
        expected = route(
            hidden, layer.router_weight, layer.correction_bias, layer.rule, layer.top_k, 2
        )
        assert hidden.shape == (token_ids.numel(), 32)
        assert torch.equal(routing.indices.sort().values, expected.indices.sort().values)
        torch.testing.assert_close(routing.logits, expected.logits)
        assert (routing.indices == layer.num_experts).sum() == token_ids.numel()
