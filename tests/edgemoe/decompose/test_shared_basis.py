"""Bases of a whole layer: what they do to its output, and what they cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.decompose.projection import output_second_moment
from edgemoe.decompose.shared_basis import (
    largest_rank,
    share_basis,
    shared_basis,
    stored_parameters,
)
from edgemoe.errors import PlanError
from edgemoe.models import adapt_model
from edgemoe.models.layers.shared_basis import based, to_shared_basis
from edgemoe.models.tiny import tiny_config, tiny_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models import MoeLayer
    from edgemoe.oracle.oracle import LayerOracle

FAMILIES = ("qwen3_moe", "gpt_oss", "nemotron_h")
TOKENS = 300


def first_layer(family: str, **changes: Any) -> MoeLayer:
    return adapt_model(tiny_model(tiny_config(family, **changes))).layers[0]


@torch.no_grad()
def call(layer: MoeLayer, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the routed experts return, and how often each was chosen."""
    choice: list[torch.Tensor] = []
    hook = layer.experts.register_forward_pre_hook(lambda _, given: choice.extend(given[1:]))
    found: list[torch.Tensor] = []
    after = layer.experts.register_forward_hook(lambda _, __, output: found.append(output))
    layer.block(states[None])
    hook.remove()
    after.remove()
    return found[0], torch.bincount(choice[0].flatten(), minlength=layer.num_experts)


def skewed(layer: MoeLayer, seed: int) -> torch.Tensor:
    """Tokens that lie along few directions, as hidden states do."""
    draw = torch.Generator().manual_seed(5)
    mix = torch.randn(layer.hidden_size, layer.hidden_size, generator=draw)
    mix *= torch.linspace(1, 0.05, layer.hidden_size)[:, None]
    draw.manual_seed(seed)
    return torch.randn(TOKENS, layer.hidden_size, generator=draw) @ mix * 0.3


@pytest.mark.parametrize("family", FAMILIES)
def test_more_rank_and_data_bring_the_output_nearer(family: str) -> None:
    whole = first_layer(family)
    states, others = skewed(whole, 1), skewed(whole, 2)
    outputs, counts = call(whole, states)
    expected, _ = call(whole, others)
    moments = {
        "inputs": states.double().T @ states.double(),
        "outputs": outputs.double().T @ outputs.double(),
        "shares": counts.tolist(),
    }
    errors: dict[tuple[bool, int], float] = {}
    for has_data in (False, True):
        for rank in (16, 32, 64):
            layer = first_layer(family)
            given: Any = moments if has_data else {}
            found = share_basis(layer, rank, **given)
            to_shared_basis(layer, found.tensors)
            output, _ = call(layer, others)
            errors[has_data, rank] = float((output - expected).norm() / expected.norm())
            assert (found.input_lost < 1e-9) == (found.output_lost < 1e-9) == (rank == 64)
    for has_data in (False, True):
        assert errors[has_data, 16] > errors[has_data, 32] > errors[has_data, 64]
        assert errors[has_data, 64] < 1e-5
    for rank in (16, 32):
        assert errors[True, rank] < 0.9 * errors[False, rank]


@pytest.mark.parametrize("family", FAMILIES)
def test_between_bases_are_the_experts_projected(family: str) -> None:
    layer = first_layer(family)
    found = share_basis(layer, 24, shares=range(8))
    reads, writes = (found.tensors[f"{name}_basis"] for name in ("input", "output"))
    biases = layer.tensors().get(f"{layer.spec.experts}.down_proj_bias")
    gate_up, down = layer.gate_up, layer.down
    moment = output_second_moment(down, biases=biases, shares=range(8))

    to_shared_basis(layer, found.tensors)
    # Without data the projection of inputs is orthogonal, as that of outputs always is.
    torch.testing.assert_close(layer.gate_up, gate_up @ reads.T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.down, writes.T @ down, rtol=1e-4, atol=1e-5)
    kept = (writes.T.double() @ moment @ writes.double()).trace() / moment.trace()
    assert found.output_lost == pytest.approx(1 - float(kept), abs=1e-6)
    if biases is not None:
        reduced = layer.tensor(f"{layer.spec.experts}.down_proj_bias")
        torch.testing.assert_close(reduced, biases @ writes, rtol=1e-4, atol=1e-5)
        alone = output_second_moment(down, shares=range(8))
        assert not torch.allclose(alone, moment)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_count_is_that_of_the_tensors(family: str, dtype: torch.dtype) -> None:
    layer = adapt_model(tiny_model(tiny_config(family)).to(dtype)).layers[0]
    before = sum(parameter.numel() for parameter in layer.experts.parameters())
    assert stored_parameters(layer) == before
    expected = stored_parameters(layer, 24)
    to_shared_basis(layer, share_basis(layer, 24).tensors)
    assert sum(parameter.numel() for parameter in layer.experts.parameters()) == expected
    assert {parameter.dtype for parameter in layer.experts.parameters()} == {dtype}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("multiple", [1, 8])
def test_the_largest_rank_is_the_largest(family: str, multiple: int) -> None:
    layer = first_layer(family)
    before = stored_parameters(layer)
    for ratio in (0.3, 0.5, 0.75, 0.999, 1.0):
        rank = largest_rank(layer, ratio, multiple=multiple)
        assert rank % multiple == 0
        assert stored_parameters(layer, rank) <= ratio * before
        more = rank + multiple
        assert more > layer.hidden_size or stored_parameters(layer, more) > ratio * before


def test_ratios_that_leave_too_little_are_refused() -> None:
    layer = first_layer("qwen3_moe")
    for ratio in (0.0, 1.1):
        with pytest.raises(PlanError, match=r"in \(0, 1\], got"):
            largest_rank(layer, ratio)
    with pytest.raises(PlanError, match=r"rank of at least 32, which is 0\.5\d\d"):
        largest_rank(layer, 0.5)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_on_tokens_it_sees_what_the_experts_module_gets_and_gives(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    view = next(make_oracle(family).walk("test"))
    layer, ranks = view.layer, [(24, 24)] * view.layer.num_experts
    with torch.no_grad():
        outputs = layer.experts(view.hidden, view.routing.indices, view.routing.weights)
    moments = [part.double().T @ part.double() for part in (view.hidden, outputs)]
    counts = torch.bincount(view.routing.indices.ravel(), minlength=layer.num_experts)
    expected = share_basis(
        layer, 24, inputs=moments[0], outputs=moments[1], shares=(counts + 1).tolist()
    )

    found = shared_basis(view, ranks)

    assert found.lost == pytest.approx((expected.input_lost, expected.output_lost), rel=1e-4)
    # Bases may differ by rounding; what the layer gives between them does not.
    answers = []
    for tensors in (found.tensors, expected.tensors):
        with based(layer, tensors), torch.no_grad():
            args = (view.hidden, view.routing.indices, view.routing.weights)
            answers.append(layer.experts(*args))
    torch.testing.assert_close(answers[0], answers[1], rtol=1e-3, atol=1e-3)
    with pytest.raises(PlanError, match=r"must have one rank, got \[8, 24\]"):
        shared_basis(view, [(24, 8), *ranks[1:]])
