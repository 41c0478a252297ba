"""Recovered weights reach a bundle under the name of their task, and share what they left."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch

import edgemoe
from edgemoe.errors import ExportError, TaskFileError
from edgemoe.models.checkpoint import load_model
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest, split_recoveries
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models.contract import MoeModel

pytestmark = [pytest.mark.fused, pytest.mark.usefixtures("one_trace")]

RAGGED: list[list[tuple[int, ...]]] = [[(0,), (2,), (3, 5), (7,)], [(1,), (4,), (6,)]]
OTHER: list[list[tuple[int, ...]]] = [[(1,), (2,), (7,)], [(4,), (6,), (7,)]]


@dataclass
class Made:
    """Plans and what was recovered from them."""

    folder: Path
    plans: dict[str, Path]
    recovered: dict[str, Path]


def plan_of(layers: list[list[tuple[int, ...]]]) -> Plan:
    return Plan(
        method="by hand",
        layers=tuple(
            LayerPlan(
                layer=index, experts=tuple(MergedExpert(members=members) for members in experts)
            )
            for index, experts in enumerate(layers)
        ),
    )


@pytest.fixture(scope="module")
def made(
    checkpoint: Path, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Made:
    folder = tmp_path_factory.mktemp("recovered")
    found = Made(folder, {}, {})
    for name, layers in {"low": RAGGED, "high": OTHER}.items():
        found.plans[name] = folder / f"{name}.json"
        plan_of(layers).save(found.plans[name])
        edgemoe.apply_plan(checkpoint, found.plans[name], folder / f"{name}-pruned")
        found.recovered[name] = folder / name
        edgemoe.recover(
            folder / f"{name}-pruned",
            {name: tasks[name]},
            "least-squares",
            found.recovered[name],
            teacher=checkpoint,
        )
    return found


def request_of(checkpoint: Path, output: Path, **changes: Any) -> ExportRequest:
    given: dict[str, Any] = {"target": "cpu", "precision": "fp32", "speed": False}
    return ExportRequest(model=checkpoint, output=output, **{**given, **changes})


def logits_of(graph: Path, model: MoeModel) -> tuple[np.ndarray[Any, Any], ...]:
    ids = np.arange(3, 23)[None]
    runner = GraphRunner(graph)
    runner.start(1, [layer.slots for layer in model.layers])
    with torch.inference_mode():
        expected = model.model(torch.from_numpy(ids)).logits.numpy()
    return runner.run(ids), expected


@pytest.mark.slow
@pytest.mark.parametrize("limit", [None, 0])
def test_recovered_weights_of_two_tasks_beside_the_checkpoints_own(
    checkpoint: Path, made: Made, tmp_path: Path, limit: int | None
) -> None:
    output = tmp_path / "bundle"
    report = export_bundle(
        request_of(
            checkpoint,
            output,
            plans={"own": made.plans["low"]},
            recovered=made.recovered,
            memory_limit_bytes=limit,
        )
    )
    verify_bundle(output)
    manifest = load_manifest(output)
    for name, path in made.recovered.items():
        got, expected = logits_of(output / f"{name}.onnx", load_model(path))
        assert np.abs(got - expected).max() < 1e-4 * max(1.0, np.abs(expected).max())
        entry = manifest.tasks[name]
        assert entry.weights is not None
        assert entry.weights.recovered_by == ("least-squares",)
        assert entry.weights.described == f"{name}'s, recovered by least-squares"
        assert entry.weights.checkpoint_sha256 == load_model(path).sha256
    own = manifest.tasks["own"].weights
    assert own is not None
    assert own.described == "tiny's own, not recovered"
    assert own.checkpoint_sha256 == manifest.model.checkpoint_sha256
    # The experts are named by the exported checkpoint.
    for name, layers in {"low": RAGGED, "high": OTHER, "own": RAGGED}.items():
        listed = manifest.tasks[name].experts
        assert listed is not None
        groups = [sorted((e,) if isinstance(e, int) else e for e in layer) for layer in listed]
        assert groups == [sorted(layer) for layer in layers]
    # What recovery left as it was is stored once; what it changed, with its task.
    files = {
        name: {
            tensor.name: {entry.key: entry.value for entry in tensor.external_data}["location"]
            for tensor in onnx.load(
                output / f"{name}.onnx", load_external_data=False
            ).graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        for name in manifest.tasks
    }
    apart = {
        name: {f for f in found.values() if f != "shared.onnx.data"}
        for name, found in files.items()
    }
    assert apart["low"] == {"low.onnx.data"}
    assert apart["high"] == {"high.onnx.data"}
    assert all(
        "down" in tensor for tensor, file in files["low"].items() if file == "low.onnx.data"
    )
    assert report.tasks["low"].agreement.same_token_share < 1
    assert report.to_json()["tasks"]["low"]["weights"]["recovered_by"] == ["least-squares"]


@pytest.mark.slow
def test_factored_and_adapted_weights_travel(
    checkpoint: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    """Low ranks have a graph of their own, a k policy and merged adapters come along."""
    stats = tmp_path / "stats.safetensors"
    edgemoe.calibrate(checkpoint, tasks, stats)
    edgemoe.decompose(
        checkpoint, stats, "low", "svd", param_ratio=0.5, output=tmp_path / "low.json"
    )
    edgemoe.apply_plan(checkpoint, tmp_path / "low.json", tmp_path / "factored")
    edgemoe.allocate(
        checkpoint, {"high": tasks["high"]}, "top-p", output=tmp_path / "high.json"
    )
    edgemoe.apply_plan(checkpoint, tmp_path / "high.json", tmp_path / "policy")
    edgemoe.recover(
        tmp_path / "policy",
        {"high": tasks["high"]},
        "lora",
        tmp_path / "adapted",
        steps=4,
        learning_rate=0.01,
    )
    recovered = {"low": tmp_path / "factored", "high": tmp_path / "adapted"}
    output = tmp_path / "bundle"
    export_bundle(request_of(checkpoint, output, target="jetson-orin", recovered=recovered))
    manifest = load_manifest(output)
    for name, path in recovered.items():
        model = load_model(path)
        got, expected = logits_of(output / f"{name}.onnx", model)
        assert np.abs(got - expected).max() < 1e-3 * max(1.0, np.abs(expected).max())
        assert manifest.tasks[name].experts is None
    assert manifest.tasks["high"].k_table is not None


def test_a_checkpoint_of_another_model_is_refused_first(
    checkpoint: Path, made: Made, tasks: dict[str, Path], tmp_path: Path
) -> None:
    def refuse(**changes: Any) -> str:
        with pytest.raises(ExportError) as caught:
            export_bundle(request_of(checkpoint, tmp_path / "b", **changes))
        return str(caught.value)

    stranger = {"low": made.folder / "low-pruned"}
    other = replace(request_of(made.recovered["high"], tmp_path / "b"), recovered=stranger)
    with pytest.raises(ExportError, match=r"--from low must be made from .*high \(checkpoint"):
        export_bundle(other)
    assert "names no other checkpoint" in refuse(recovered={"low": checkpoint})
    both = {"recovered": {"low": made.recovered["low"]}, "plans": {"low": made.plans["high"]}}
    assert "the plan of low must be the one" in refuse(**both)
    # One that does not say which experts it has needs its plan.
    old = tmp_path / "old"
    old.mkdir()
    for file in made.recovered["low"].iterdir():
        (old / file.name).write_bytes(file.read_bytes())
    for name in ("config.json", "edgemoe.json"):
        content = json.loads((old / name).read_text())
        note = content["edgemoe"] if name == "config.json" else content
        del note["provenance"]["before"]["experts"]
        (old / name).write_text(json.dumps(content))
    assert "Give its plan too: --plan low=PLAN" in refuse(recovered={"low": old})
    # Lines that recovery read are no evidence.
    seen = {"low": tasks["low"]}
    with pytest.raises(TaskFileError, match="12 of 12 lines"):
        export_bundle(
            request_of(
                checkpoint,
                tmp_path / "b",
                tasks=seen,
                recovered={"low": made.recovered["low"]},
                max_drop=0.5,
                accept_weak_evidence=True,
            )
        )
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_an_export_recovers_on_the_lines_that_chose(
    checkpoint: Path, write_task: Callable[..., Path], tmp_path: Path
) -> None:
    task = write_task(tmp_path / "low.jsonl", 3, 40, lines=40)
    request = request_of(
        checkpoint,
        tmp_path / "bundle",
        tasks={"low": task},
        keep=0.5,
        recover=("least-squares,router-kd:steps=2,batch-tokens=64",),
        ladder=False,
    )
    report = export_bundle(request)
    entry = load_manifest(report.output).tasks["low"]
    assert entry.weights is not None
    assert entry.weights.described == "tiny's, recovered by least-squares, then router-kd"
    assert entry.quality is not None
    assert entry.quality.data is not None
    # No held-out line was trained on: all of them judge.
    assert entry.quality.data.lines == 10
    plain = export_bundle(replace(request, output=tmp_path / "plain", recover=()))
    assert report.tasks["low"].agreement.kl_nats < plain.tasks["low"].agreement.kl_nats
    assert plain.tasks["low"].weights.described == "tiny's own, not recovered"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "low.jsonl", "plain"]


def test_methods_of_recovery_are_split_at_their_commas() -> None:
    text = "least-squares,router-kd:steps=50,batch-tokens=1024,lora"
    assert split_recoveries(text, "uncurl:steps=3") == (
        "least-squares",
        "router-kd:steps=50,batch-tokens=1024",
        "lora",
        "uncurl:steps=3",
    )
