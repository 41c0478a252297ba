"""Choices that stand for no expert: tokens with fewer experts than the others, or with none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgemoe.models import load_model, observe, save_model
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.validation.graph_runner import GraphRunner

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models import MoeLayer, MoeModel, Routing
    from edgemoe_exporters.report import ExportReport


def share_of_empty_slots(model: MoeModel) -> float:
    used: list[torch.Tensor] = []

    def keep(layer: MoeLayer, _: Any, routing: Routing, __: Any) -> None:
        used.append(routing.indices < layer.num_experts)

    ids = torch.randint(3, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(5))
    with observe(model, keep), torch.no_grad():
        model.model(input_ids=ids, use_cache=False)
    return 1 - float(torch.cat(used).float().mean())


@pytest.fixture(scope="module")
def idling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokens often use no expert, with fewer experts in later layers."""
    folder = tmp_path_factory.mktemp("idling")
    model = load_model(write_tiny_checkpoint("zaya", folder / "whole", num_hidden_layers=3))
    for layer in model.layers:
        assert layer.correction_bias is not None
        layer.correction_bias[-1] = 0.0
        layer.keep(range(layer.num_experts - layer.index))
    (folder / "ragged").mkdir()
    save_model(model, folder / "ragged", source=folder / "whole")
    return folder / "ragged"


@pytest.mark.fused
@pytest.mark.parametrize(
    "target", ["cpu", pytest.param("tensorrt-rtx", marks=pytest.mark.slow)]
)
def test_graphs_leave_the_same_slots_empty(idling: Path, target: str, tmp_path: Path) -> None:
    model = load_model(idling)
    assert 0.03 < share_of_empty_slots(model) < 0.6
    run(idling, tmp_path / "bundle", target, "fp32")

    ids = torch.randint(3, VOCAB_SIZE, (1, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model.model(input_ids=ids, use_cache=False).logits
    runner = GraphRunner(tmp_path / "bundle" / "model.onnx")
    runner.start(1, [1] * 3)
    parts = [runner.run(ids[:, start:stop].numpy()) for start, stop in ((0, 51), (51, 60))]
    found = torch.from_numpy(np.concatenate(parts, axis=1))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_narrow_graphs_stay_near(idling: Path, precision: str, tmp_path: Path) -> None:
    (task,) = run(idling, tmp_path / "bundle", "cpu", precision).tasks.values()
    assert task.parity.mean_kl < {"fp16": 1e-3, "int8": 0.1, "int4": 0.3}[precision]


def run(path: Path, output: Path, target: str, precision: str) -> ExportReport:
    asked = ExportRequest(model=path, output=output, target=target, precision=precision)
    return export_bundle(asked)
