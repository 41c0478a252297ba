"""What is traced, before it is: the ops run eagerly and give what the family's code gives."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from edgemoe.errors import ExportError
from edgemoe.models import FAMILIES, MoeModel, adapt_model, limit_k, load_model, save_model
from edgemoe.models.discovery import build_skeleton
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.registry import find_family
from edgemoe.models.tiny import VOCAB_SIZE, tiny_config, tiny_model, write_tiny_checkpoint
from edgemoe_exporters.tracing.prepare.model import WITHOUT_GRAPH, check_exportable, prepared

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

STEPS = (6, 1, 1, 3)


def skeleton(config: PreTrainedConfig) -> MoeModel:
    return adapt_model(build_skeleton(find_family(config.model_type), config))


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - WITHOUT_GRAPH))
@pytest.mark.parametrize("cap", [99, 1])
def test_a_prepared_model_says_what_the_model_says(family: str, cap: int) -> None:
    config = tiny_config(family)
    with prepared(skeleton(config)) as module:
        cached = module.cached
    model = adapt_model(tiny_model(config))
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(3, VOCAB_SIZE, (2, sum(STEPS)), generator=draw)
    with torch.no_grad(), limit_k(model, cap):
        expected = model.model(input_ids=ids, use_cache=False).logits

    parts, seen = [], 0
    with prepared(model) as module, torch.no_grad():
        assert module.cached == cached
        past = [tensor.zeros(2, 0, torch.float32) for tensor in cached]
        for step in STEPS:
            positions = torch.arange(seen, seen + step).repeat(2, 1)
            mask = torch.ones(2, seen + step, dtype=torch.int64)
            caps = torch.full((len(model.layers),), cap)
            logits, past = module(ids[:, seen : seen + step], mask, positions, past, caps)
            parts.append(logits)
            seen += step

    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad(), limit_k(model, cap):
        assert torch.equal(model.model(input_ids=ids, use_cache=False).logits, expected)


@pytest.mark.parametrize("family", sorted(WITHOUT_GRAPH))
def test_what_a_graph_cannot_hold_is_refused_by_name_without_weights(family: str) -> None:
    with (
        pytest.raises(ExportError, match=f"{family}.* families with graphs: afmoe, "),
        prepared(skeleton(tiny_config(family))),
    ):
        pass


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("family", ["mixtral", "gemma4_text"])
def test_experts_without_a_quantised_op_are_refused_without_weights(
    family: str, precision: str, tmp_path: Path
) -> None:
    """Mixtral's because they are factored, those of Gemma because they have GELU."""
    model = load_model(write_tiny_checkpoint(family, tmp_path / "whole"))
    factor_layer(model.layers[0], split_by_svd(model.layers[0], 4))
    path = tmp_path / "factored"
    path.mkdir()
    save_model(model, path)
    (path / "model.safetensors").unlink()

    check_exportable(path, "fp16")
    with pytest.raises(ExportError, match=f"experts must .* in {precision}.*fp32 or fp16"):
        check_exportable(path, precision)


def test_angles_that_change_with_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    with (
        pytest.raises(ExportError, match=r"rope_type must not be .* got 'dynamic'"),
        prepared(skeleton(tiny_config("mixtral", rope_parameters=rope))),
    ):
        pass
