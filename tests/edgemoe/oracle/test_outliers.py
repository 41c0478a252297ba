from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from edgemoe.errors import PlanError
from edgemoe.layerwise.provider import open_layers
from edgemoe.models.hooks import observe
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.oracle.outliers import outlier_ratios
from tests.edgemoe.tiny_oracle import draw_windows

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import Any

    from numpy.typing import NDArray

MULTIPLE = 2.0


def ratios_of_the_whole_model(oracle: LayerOracle) -> list[float]:
    """D_l in float64, from what eager experts are given by hooks on the whole model."""
    seen: dict[int, list[tuple[Any, Any]]] = {layer.index: [] for layer in oracle.moe.layers}

    def keep(layer: Any, hidden: torch.Tensor, routing: Any, _: Any) -> None:
        seen[layer.index].append((hidden.clone(), routing.indices.clone()))

    with torch.no_grad(), observe(oracle.moe, keep):
        for window in oracle.windows:
            oracle.moe.model(input_ids=torch.tensor([window.ids]), use_cache=False)
    found = []
    for layer in oracle.moe.layers:
        hidden = torch.cat([h for h, _ in seen[layer.index]]).double().numpy()
        chosen = torch.cat([i for _, i in seen[layer.index]]).numpy()
        entries = []
        for expert in range(layer.num_experts):
            inputs = hidden[(chosen == expert).any(axis=1)]
            gate_up = layer.gate_up[expert].double().numpy()
            gate, up = np.split(inputs @ gate_up.T, 2, axis=1)
            units = gate / (1 + np.exp(-gate)) * up
            for weight, given in ((gate_up, inputs), (layer.down[expert].numpy(), units)):
                entries.append(np.abs(weight) * np.sqrt((given**2).sum(axis=0)))
        flat: NDArray[np.float64] = np.concatenate([entry.ravel() for entry in entries])
        found.append(float((flat > MULTIPLE * flat.mean()).mean()))
    return found


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
def test_outliers_are_those_of_the_formula(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    oracle = make_oracle(family)
    found = outlier_ratios(oracle, MULTIPLE)
    assert found.tolist() == pytest.approx(ratios_of_the_whole_model(oracle), abs=2e-4)
    assert len(set(found.tolist())) == len(found)
    assert found.min() > 0.02
    assert outlier_ratios(oracle, 1e9).max() == 0


def test_transposed_and_interleaved_experts_have_the_outliers_of_their_matrices(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("gpt_oss")
    view = next(iter(oracle.walk("test")))
    expert = int(view.routing.indices[0, 0])
    units = view.layer.expert_units(expert, view.hidden)
    experts: Any = view.layer.experts
    output = units @ experts.down_proj[expert] + experts.down_proj_bias[expert]
    torch.testing.assert_close(output, view.layer.expert_output(expert, view.hidden))
    assert 0 < outlier_ratios(oracle, MULTIPLE).min() < 0.5


def test_a_model_larger_than_memory_has_the_same_outliers(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("qwen2_moe", tmp_path / "model")
    streamed, whole = open_layers(path, limit_bytes=1), open_layers(path)
    assert not streamed.is_whole
    one = outlier_ratios(LayerOracle(streamed, draw_windows()), MULTIPLE)
    other = outlier_ratios(LayerOracle(whole, draw_windows()), MULTIPLE)
    assert one.tolist() == pytest.approx(other.tolist(), abs=2e-4)


def test_experts_without_whole_matrices_are_refused(
    make_oracle: Callable[..., LayerOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = make_oracle("mixtral")
    monkeypatch.setattr(type(oracle.moe.layers[0]), "is_factored", True)
    with pytest.raises(PlanError, match="Prune first, then decompose"):
        outlier_ratios(oracle, MULTIPLE)
