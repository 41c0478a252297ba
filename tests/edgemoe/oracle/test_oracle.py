from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.apply.expert_tensors import plan_tensors
from edgemoe.calibrate.sample import Window
from edgemoe.errors import StatisticsError, StreamingError
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers, open_layers, whole_model
from edgemoe.models import load_model
from edgemoe.models.hooks import observe
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.plan import LayerPlan, MergedExpert

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgemoe.models.contract import MoeModel


def hidden_of(model: MoeModel, windows: Sequence[Window]) -> dict[int, torch.Tensor]:
    """What reaches every MoE layer when the model runs as a whole."""
    found: dict[int, list[torch.Tensor]] = {layer.index: [] for layer in model.layers}

    def keep(layer: Any, hidden: torch.Tensor, *_: Any) -> None:
        found[layer.index].append(hidden.clone())

    with torch.no_grad(), observe(model, keep):
        for window in windows:
            model.model(input_ids=torch.tensor([window.ids]), use_cache=False)
    return {index: torch.cat(parts) for index, parts in found.items()}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_next"])
def test_layers_see_what_they_see_in_the_whole_model(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    oracle = make_oracle(family)
    expected = hidden_of(oracle.moe, oracle.windows)
    views = {view.layer.index: view for view in oracle.walk("test")}
    assert list(views) == list(expected)
    for index, view in views.items():
        torch.testing.assert_close(view.hidden, expected[index])
        assert len(view.routing.indices) == oracle.tokens == 26


def test_layers_after_a_changed_one_see_the_change(
    make_oracle: Callable[..., LayerOracle], make_moe: Callable[..., MoeModel]
) -> None:
    oracle = make_oracle("mixtral")
    singles = tuple(MergedExpert(members=(expert,)) for expert in (1, 2, 5))
    merged = LayerPlan(layer=1, experts=(MergedExpert(members=(0, 3)), *singles))
    found = {}
    for view in oracle.walk("test"):
        found[view.layer.index] = view.hidden
        if view.layer.index == 1:
            view.go_on_with(plan_tensors(view.layer, merged))
    other = make_moe("mixtral")
    whole = hidden_of(other, oracle.windows)
    other.layers[1].replace(plan_tensors(other.layers[1], merged))
    changed = hidden_of(other, oracle.windows)
    for index, hidden in found.items():
        torch.testing.assert_close(hidden, (changed if index > 1 else whole)[index])
    assert not torch.allclose(found[2], whole[2])
    # The model is as it was.
    again = hidden_of(oracle.moe, oracle.windows)
    assert all(torch.equal(again[index], whole[index]) for index in whole)


def test_a_model_larger_than_memory_gives_the_same(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("qwen2_moe", tmp_path / "model")
    windows = [Window(line=1, start=0, ids=[5, 9, 31, 4]), Window(line=2, start=0, ids=[7, 8])]
    streamed, whole = open_layers(path, limit_bytes=1), open_layers(path)
    assert isinstance(streamed, StreamedLayers)
    assert isinstance(whole, InMemoryLayers)
    pairs = zip(
        LayerOracle(streamed, windows).walk("test"),
        LayerOracle(whole, windows).walk("test"),
        strict=True,
    )
    for one, other in pairs:
        torch.testing.assert_close(one.hidden, other.hidden)
        assert torch.equal(one.routing.indices, other.routing.indices)
    assert all(parameter.is_meta for parameter in streamed.moe.model.parameters())
    assert whole_model(whole, "this") is whole.moe.model
    with pytest.raises(StreamingError, match="this must have the whole model in memory"):
        whole_model(streamed, "this")


def test_statistics_without_tokens_are_refused(tmp_path: Path) -> None:
    home = InMemoryLayers(load_model(write_tiny_checkpoint("mixtral", tmp_path / "model")))
    with pytest.raises(StatisticsError, match="must hold tokens"):
        LayerOracle(home, [])
