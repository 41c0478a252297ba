"""`--keep auto`: the deepest cut that holds, and what an export that is refused leaves."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.errors import PlanError, QualityGateError
from edgemoe.evaluate import evaluation
from edgemoe.evaluate.drop import Drop
from edgemoe.evaluate.gate import JudgedDrop
from edgemoe.models.checkpoint import load_model
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe_exporters import choosing, stages
from edgemoe_exporters.cut_search import Cut, find_deepest, list_cuts
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from pathlib import Path


def judged(upper: float) -> JudgedDrop:
    drop = Drop(upper / 2, (0.0, upper))
    return JudgedDrop(metric="perplexity", drop=drop, lines=30, chance=96)


@given(st.lists(st.floats(0, 2), min_size=1, max_size=40), st.floats(0, 1))
def test_the_deepest_that_holds_of_cuts_that_cost_more_and_more(
    uppers: list[float], limit: float
) -> None:
    uppers.sort()
    cuts = [Cut(1 - (n + 1) / 100, (n,)) for n in range(len(uppers))]
    tried: list[Cut] = []

    def judge(cut: Cut) -> JudgedDrop:
        tried.append(cut)
        return judged(uppers[cut.counts[0]])

    holding = [cut for cut, upper in zip(cuts, uppers, strict=True) if upper <= limit + 1e-6]
    if holding:
        assert find_deepest("t", cuts, judge, limit) == holding[-1]
    else:
        with pytest.raises(QualityGateError, match=f"got none: --keep {cuts[0].keep:g}: "):
            find_deepest("t", cuts, judge, limit)
    assert len(set(tried)) == len(tried) <= len(cuts).bit_length()


def test_cuts_are_those_that_a_router_can_choose_from() -> None:
    layers = (
        LayerShape(layer=0, num_experts=8, top_k=2),
        LayerShape(layer=1, num_experts=4, top_k=2),
    )
    shape = ModelShape(family="t", layers=layers, hidden_size=64, intermediate_size=32)
    assert [cut.counts for cut in list_cuts("reap", shape)] == [
        (7, 4), (6, 3), (5, 3), (4, 2), (3, 2),
    ]  # fmt: skip
    grouped = replace(shape, layers=(replace(layers[0], n_group=4),))
    assert [cut.counts for cut in list_cuts("reap", grouped)] == [(4,)]
    widths = [sum(cut.counts) for cut in list_cuts("camera", shape)]
    assert widths == sorted(widths, reverse=True)
    assert max(widths) < 64
    every = replace(shape, layers=(replace(layers[1], top_k=4),))
    with pytest.raises(PlanError, match="no expert can go"):
        list_cuts("reap", every)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a task of what it says itself, so that each expert counts."""
    folder = tmp_path_factory.mktemp("auto")
    write_tiny_checkpoint("mixtral", folder / "moe", num_hidden_layers=2)
    model: Any = load_model(folder / "moe").model
    torch.manual_seed(1)
    starts = (torch.arange(96) % 40 + 3)[:, None]
    drawn = model.generate(
        starts,
        attention_mask=torch.ones_like(starts),
        max_new_tokens=14,
        min_new_tokens=14,
        do_sample=True,
        temperature=0.5,
        top_k=0,
        pad_token_id=0,
    )
    lines = [{"text": " ".join(f"w{token}" for token in row)} for row in drawn.tolist()]
    (folder / "t.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.usefixtures("one_trace")
@pytest.mark.parametrize("limit", [None, 0])
def test_what_is_refused_is_kept_and_the_next_attempt_uses_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int | None
) -> None:
    output = tmp_path / "bundle"
    request = ExportRequest(
        model=folder / "moe",
        output=output,
        target="cpu",
        precision="fp32",
        tasks={"t": folder / "t.jsonl"},
        keep="auto",
        max_drop=0.0001,
        ladder=False,
        speed=False,
        memory_limit_bytes=limit,
    )
    with pytest.raises(QualityGateError, match=r"got none: --keep 0\.875: .*Kept in .*partial"):
        export_bundle(request)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle.kept.partial"]
    kept = {
        path.name.split(".")[1] for path in (tmp_path / "bundle.kept.partial/kept").iterdir()
    }
    assert kept == {"score", "statistics"}
    # Neither the checkpoint is scored again, nor is anything calibrated.
    scored: list[object] = []
    own = evaluation.evaluate

    def note(*given: Any, **more: Any) -> Any:
        scored.append(given[0])
        return own(*given, **more)

    monkeypatch.setattr(choosing, "evaluate", note)
    monkeypatch.setattr(
        choosing.TaskChooser, "_collect", lambda *_: pytest.fail("calibrated again")
    )
    found = export_bundle(replace(request, max_drop=1.0))
    assert "the statistics of t" in found.reused
    assert any("taken from the attempt before" in note for note in found.notes)
    assert all(type(scorer).__name__ == "GraphScorer" for scorer in scored)
    entry = load_manifest(output).tasks["t"]
    assert entry.quality is not None
    assert entry.quality.drop is not None
    drop: Any = entry.quality.drop
    assert drop["ci95"][1] <= 1.0
    kept_experts = entry.experts_per_layer
    assert max(kept_experts) < 8
    assert not (tmp_path / "bundle.kept.partial").exists()
    # One expert fewer would not hold, or cannot be.
    if kept_experts[0] > 2:
        deeper = replace(request, keep=(kept_experts[0] - 1) / 8, max_drop=1.0, force=True)
        monkeypatch.undo()
        with pytest.raises(QualityGateError, match="with 95% confidence"):
            export_bundle(deeper)
        assert load_manifest(output).tasks["t"].experts_per_layer == kept_experts


@pytest.mark.slow
@pytest.mark.fused
@pytest.mark.usefixtures("one_trace")
def test_what_is_interrupted_is_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ExportRequest(
        model=folder / "moe",
        output=tmp_path / "bundle",
        target="cpu",
        precision="fp32",
        tasks={"t": folder / "t.jsonl"},
        keep=0.5,
        ladder=False,
        speed=False,
    )

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(stages, "check_parity", interrupt)
        with pytest.raises(KeyboardInterrupt, match="What is finished is in"):
            export_bundle(request)
    found = export_bundle(replace(request, keep=0.75))
    assert set(found.reused) == {"the score of the checkpoint on t", "the statistics of t"}
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
