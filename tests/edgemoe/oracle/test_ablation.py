from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgemoe.oracle.ablation import loss_increases

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.oracle import LayerOracle


def loss_of(model: MoeModel, windows: Sequence[Window]) -> float:
    losses = []
    with torch.no_grad():
        for window in windows:
            ids = torch.tensor([window.ids])
            logits = model.model(input_ids=ids, use_cache=False).logits[0, :-1].double()
            logprobs = torch.log_softmax(logits, dim=-1)
            losses += logprobs.gather(1, ids[0, 1:, None]).ravel().neg().tolist()
    return float(np.mean(losses))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3"])
def test_increases_are_those_of_the_whole_model(
    make_oracle: Callable[..., LayerOracle], make_moe: Callable[..., MoeModel], family: str
) -> None:
    oracle = make_oracle(family)
    found = loss_increases(oracle)
    model = make_moe(family)
    base = loss_of(model, oracle.windows)
    for layer, increases in zip(model.layers, found, strict=True):
        assert increases.shape == (layer.num_experts,)
        for expert in (0, layer.num_experts - 1):
            if layer.shape.n_group == 1:
                left = [other for other in range(layer.num_experts) if other != expert]
                tensors = layer.select(left)
            else:
                # Groups must stay equal: the expert is there and gives nothing.
                tensors = {name: tensor.clone() for name, tensor in layer.tensors().items()}
                tensors[f"{layer.spec.experts}.down_proj"][expert] = 0
            with layer.changed(tensors):
                expected = loss_of(model, oracle.windows) - base
            assert increases[expert] == pytest.approx(max(0.0, expected), abs=2e-6)
    assert max(increases.max() for increases in found) > 1e-3
