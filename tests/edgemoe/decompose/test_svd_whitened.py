"""What whitened factors lose, measured on the tokens that reach each expert."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy
import torch

from edgemoe.decompose.layer_factors import expert_matrices
from edgemoe.decompose.svd import svd
from edgemoe.decompose.svd_whitened import svd_whitened
from edgemoe.models.routing.routers import Routing

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgemoe.oracle.oracle import LayerOracle, LayerView

FAMILIES = ("mixtral", "gpt_oss", "nemotron_h")
RANKS = (5, 4)


def first_view(oracle: LayerOracle) -> LayerView:
    layer = oracle.moe.layers[0]
    return next(view for view in oracle.walk("test") if view.layer is layer)


def error(
    weight: torch.Tensor,
    factors: dict[str, torch.Tensor],
    name: str,
    expert: int,
    inputs: NDArray[np.float64],
) -> float:
    new = factors[f"{name}_out"][expert].double() @ factors[f"{name}_in"][expert].double()
    return float(((inputs @ (weight.double() - new).numpy().T) ** 2).sum())


def least(weight: torch.Tensor, inputs: NDArray[np.float64], rank: int) -> float:
    values = scipy.linalg.svdvals(inputs @ weight.double().numpy().T)
    return float((values[rank:] ** 2).sum())


def second_inputs(
    view: LayerView, factors: dict[str, torch.Tensor], expert: int, hidden: torch.Tensor
) -> NDArray[np.float64]:
    """What the second product is given when the first is factored, computed anew."""
    layer = view.layer
    units = hidden @ factors["up_in"][expert].T @ factors["up_out"][expert].T
    bias = f"{layer.layout.gate_up_name}_bias"
    if layer.layout.has_bias:
        units = units + layer.tensor(f"{layer.spec.experts}.{bias}")[expert]
    # Gate before up, by the activation as the kit knows it.
    assert layer.activation is not None
    units = layer.layout.to_canonical(bias, units)
    halves = units.chunk(2, dim=-1) if layer.layout.has_gate else (units,)
    return layer.activation(*halves).double().numpy()


@pytest.mark.parametrize("family", FAMILIES)
def test_each_expert_is_nearest_on_its_own_tokens(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    view = first_view(make_oracle(family))
    ranks = [RANKS] * view.layer.num_experts

    whitened = svd_whitened(view, ranks, prior_tokens=0)
    plain = svd(view.layer, ranks)

    lost, won = np.zeros(2), 0
    for expert in range(view.layer.num_experts):
        routed = (view.routing.indices == expert).any(dim=1)
        hidden = view.hidden[routed]
        first, second = expert_matrices(view.layer, expert)
        for part, (name, weight) in enumerate((("up", first), ("down", second))):
            inputs = (
                hidden.double().numpy()
                if name == "up"
                else second_inputs(view, whitened.tensors, expert, hidden)
            )
            optimum = least(weight, inputs, RANKS[part])
            found = error(weight, whitened.tensors, name, expert, inputs)
            size = float(((inputs @ weight.double().numpy().T) ** 2).sum())
            assert found == pytest.approx(optimum, rel=1e-4, abs=1e-6 * size)
            without = error(weight, plain.tensors, name, expert, inputs)
            assert found <= without * (1 + 1e-4) + 1e-6 * size
            won += found < 0.99 * without
            lost[part] += found
    assert won > view.layer.num_experts
    np.testing.assert_allclose(whitened.lost, lost, rtol=1e-3)


def test_an_expert_with_few_tokens_borrows_from_all(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    """Expert 1 is reached by no token, expert 0 by three."""
    view = first_view(make_oracle("mixtral"))
    indices = view.routing.indices.clone().fill_(view.layer.num_experts)
    indices[:3, 0] = 0
    view.routing = Routing(view.routing.logits, view.routing.weights, indices)
    hidden = view.hidden.double().numpy()
    share = 10 / len(hidden)

    found = svd_whitened(view, [RANKS] * view.layer.num_experts, prior_tokens=10).tensors

    first, second = expert_matrices(view.layer, 1)
    assert error(first, found, "up", 1, hidden) == pytest.approx(
        least(first, hidden, RANKS[0]), rel=1e-4
    )
    inputs = second_inputs(view, found, 1, view.hidden)
    assert error(second, found, "down", 1, inputs) == pytest.approx(
        least(second, inputs, RANKS[1]), rel=1e-4
    )
    # Three tokens, and ten that are as all tokens are on average.
    both = np.concatenate((hidden[:3], hidden * share**0.5))
    first, _ = expert_matrices(view.layer, 0)
    assert error(first, found, "up", 0, both) == pytest.approx(
        least(first, both, RANKS[0]), rel=1e-4
    )


def test_without_prior_an_expert_that_no_token_reaches_is_factored_plainly(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    view = first_view(make_oracle("mixtral"))
    indices = torch.full_like(view.routing.indices, view.layer.num_experts)
    view.routing = Routing(view.routing.logits, view.routing.weights, indices)
    ranks = [RANKS] * view.layer.num_experts

    found = svd_whitened(view, ranks, prior_tokens=0).tensors

    expected = svd(view.layer, ranks).tensors
    for name in ("up", "down"):
        torch.testing.assert_close(
            found[f"{name}_out"] @ found[f"{name}_in"],
            expected[f"{name}_out"] @ expected[f"{name}_in"],
        )
