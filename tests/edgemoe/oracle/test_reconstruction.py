from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.models.hooks import observe
from edgemoe.oracle.reconstruction import Reconstruction, dense_gates

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing
    from edgemoe.oracle.oracle import LayerOracle, LayerView


def block_output(layer: MoeLayer, view: LayerView) -> torch.Tensor:
    """What the family's own block gives, all tokens as one sequence."""
    output = layer.block(view.hidden[None])
    found = output if isinstance(output, torch.Tensor) else output[0]
    return found.reshape(view.hidden.shape).double()


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "phimoe", "glm4_moe"]
)
def test_errors_are_those_of_the_familys_block(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    checked = 0
    for view in make_oracle(family).walk("test"):
        layer, judge = view.layer, Reconstruction(view)
        whole = block_output(layer, view)
        groups = torch.arange(layer.num_experts).reshape(layer.shape.n_group, -1)
        everything = tuple(range(layer.num_experts))
        assert judge.error(everything) <= 1e-9 * judge.norm
        for lost in itertools.combinations(range(groups.shape[1]), 2):
            gone = set(groups[:, list(lost)].ravel().tolist())
            kept = tuple(expert for expert in everything if expert not in gone)
            with layer.changed(layer.select(kept)):
                expected = float((whole - block_output(layer, view)).square().sum())
            assert judge.error(kept) == pytest.approx(expected, rel=1e-4)
            checked += 1
    assert checked >= 6


def test_a_set_is_judged_once(make_oracle: Callable[..., LayerOracle]) -> None:
    view = next(make_oracle("mixtral").walk("test"))
    judge = Reconstruction(view)
    error = judge.error((0, 1, 2))
    assert judge.error([0, 1, 2]) == error > 0
    assert judge.evaluated == 1


@pytest.mark.parametrize("family", ["deepseek_v4"])
def test_a_router_of_no_known_rule_is_asked_itself(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    """Its gates are then those of the model that has fewer experts."""
    oracle = make_oracle(family)
    view = next(view for view in oracle.walk("test") if view.layer.rule is None)
    layer, judge = view.layer, Reconstruction(view)
    assert judge.error(range(layer.num_experts)) <= 1e-9 * judge.norm
    kept = tuple(range(layer.num_experts - 2))
    expected: list[torch.Tensor] = []

    def keep(of: MoeLayer, _: Any, routing: Routing, __: Any) -> None:
        if of.index == layer.index:
            expected.append(dense_gates(routing, len(kept)))

    states: list[Any] = [None] * len(oracle.windows)
    with layer.changed(layer.select(kept)), observe(oracle.moe, keep):
        for index in range(layer.index + 1):
            states = oracle.run_layer(index, states)
    torch.testing.assert_close(judge.gates(kept)[:, : len(kept)], torch.cat(expected))
    assert judge.error(kept) > 0
