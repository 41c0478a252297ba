"""The largest activation is that of the model, whole and streamed, and is judged by float16."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from edgemoe.evaluate.scorer import Request
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.layerwise.activation_peaks import (
    ActivationPeaks,
    overflow_remark,
    recording_peaks,
)
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.models.checkpoint import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_peaks_are_those_of_the_hidden_states(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("qwen3_moe", tmp_path / "moe")
    model = load_model(path)
    ids = list(range(5, 25))
    requests = [Request((ids[0],), (tuple(ids[1:]),))]
    found = []
    for layers in (InMemoryLayers(model), StreamedLayers(open_streamed(path))):
        with recording_peaks() as peaks:
            TorchScorer(layers).score(requests)
        found.append((peaks.largest, peaks.layer, peaks.module))
    assert not any(module._forward_hooks for module in model.model.modules())
    with torch.no_grad():
        states = model.model(torch.tensor([ids]), output_hidden_states=True).hidden_states

    assert found[0][0] == pytest.approx(found[1][0])
    # the last one is behind the norm that follows the layers
    assert found[0][0] >= max(float(one.abs().max()) for one in states[1:-1]) - 1e-5


def test_float16_is_warned_of_where_little_is_left() -> None:
    assert overflow_remark(ActivationPeaks()) is None
    assert overflow_remark(ActivationPeaks(30_000.0, 3)) is None
    near = overflow_remark(ActivationPeaks(40_000.0, 3, "mlp"))
    assert near is not None
    assert "4e+04 in layer 3, mlp, is near" in near
    beyond = ActivationPeaks()
    beyond.see(2, "", (torch.tensor([1.0, float("nan")]), None))
    assert "inf in layer 2, is beyond" in str(overflow_remark(beyond))
