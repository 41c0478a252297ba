"""The step between an expert's two products is found by asking, with its constants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from edgemoe.models import adapt_model
from edgemoe.models.activation import Activation
from edgemoe.models.discovery import build_skeleton
from edgemoe.models.registry import find_family
from edgemoe.models.tiny import tiny_config


@pytest.mark.parametrize(
    ("family", "changes", "wanted"),
    [
        ("olmoe", {}, Activation(kind="swish")),
        ("gpt_oss", {}, Activation(kind="swish", alpha=1.702, beta=1.0, limit=7.0)),
        ("gemma4_text", {}, Activation(kind="gelu_tanh")),
        ("nemotron_h", {}, Activation(kind="relu2", gated=False)),
        (
            "inkling2_text",
            {"mlp_gate_softcap": 17.5, "mlp_up_softcap": 3.25},
            Activation(kind="swish", gate_softcap=17.5, up_softcap=3.25),
        ),
    ],
)
def test_constants_are_those_of_the_configuration(
    family: str, changes: dict[str, Any], wanted: Activation
) -> None:
    config = tiny_config(family, **changes)
    model = adapt_model(build_skeleton(find_family(family), config))
    assert {layer.activation for layer in model.layers} == {wanted}


def test_soft_caps_bound_the_factor_and_not_the_sigmoid() -> None:
    gate, up = torch.linspace(-40, 40, 81), torch.linspace(40, -40, 81)
    found = Activation(kind="swish", gate_softcap=4.0, up_softcap=2.0)(gate, up)
    for index in range(81):
        g, u = float(gate[index]), float(up[index])
        wanted = 4 * math.tanh(g / 4) / (1 + math.exp(-g)) * 2 * math.tanh(u / 2)
        assert float(found[index]) == pytest.approx(wanted, abs=1e-5)
    assert not Activation(kind="swish", up_softcap=2.0).is_swiglu
