"""Experts that every token uses and the router weighs: gates that depend on those chosen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgemoe.models import limit_k, load_model, observe, save_model
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.validation.graph_runner import GraphRunner

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models import MoeLayer, Routing

SCALE = 0.7


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with fewer experts in later layers, and gates scaled by a weight."""
    folder = tmp_path_factory.mktemp("shared")
    model = load_model(write_tiny_checkpoint("inkling_text", folder / "whole"))
    for layer in model.layers:
        assert layer.gate_scale is not None
        layer.gate_scale.fill_(SCALE)
        layer.keep(range(layer.num_experts - layer.index))
    (folder / "ragged").mkdir()
    save_model(model, folder / "ragged", source=folder / "whole")
    return folder / "ragged"


def test_gates_of_all_experts_add_up_to_the_scale_at_every_cap(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    layer = model.layers[-1]
    assert layer.rule is not None
    total = SCALE * layer.rule.scaling_factor
    shared: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []

    def keep(of: MoeLayer, _: Any, routing: Routing, __: Any) -> None:
        if of is layer:
            chosen.append(routing.weights)

    ids = torch.randint(3, VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(5))
    for cap in (layer.top_k, 1):
        with limit_k(model, cap), observe(model, keep), torch.no_grad():
            handle = layer.router.register_forward_hook(
                lambda _, __, output: shared.append(output[3])
            )
            model.model(input_ids=ids, use_cache=False)
            handle.remove()
        added = chosen.pop().sum(dim=-1) + shared.pop().sum(dim=-1)
        torch.testing.assert_close(added, torch.full_like(added, total))


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize("target", ["cpu", "tensorrt-rtx"])
def test_graphs_agree_with_eager_at_every_cap(
    checkpoint: Path, target: str, tmp_path: Path
) -> None:
    asked = ExportRequest(
        model=checkpoint, output=tmp_path / "bundle", target=target, precision="fp32"
    )
    export_bundle(asked)

    model = load_model(checkpoint)
    ids = torch.randint(3, VOCAB_SIZE, (1, 30), generator=torch.Generator().manual_seed(3))
    runner = GraphRunner(tmp_path / "bundle" / "model.onnx")
    for cap in range(1, model.layers[0].top_k + 1):
        with torch.no_grad(), limit_k(model, cap):
            expected = model.model(input_ids=ids, use_cache=False).logits
        runner.start(1, [cap] * len(model.layers))
        parts = [runner.run(ids[:, start:stop].numpy()) for start, stop in ((0, 21), (21, 30))]
        found = torch.from_numpy(np.concatenate(parts, axis=1))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_narrow_graphs_stay_near(checkpoint: Path, precision: str, tmp_path: Path) -> None:
    asked = ExportRequest(
        model=checkpoint, output=tmp_path / "bundle", target="cpu", precision=precision
    )
    (task,) = export_bundle(asked).tasks.values()
    assert task.parity.mean_kl < {"fp16": 1e-3, "int4": 0.3}[precision]
