"""A checkpoint that is larger than memory gives the bundle that it gives in memory."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import edgemoe.layerwise.replay
from edgemoe.models.checkpoint import Checkpoint, load_model
from edgemoe.models.opening import open_larger, open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe.resume import WorkDirectory
from edgemoe_exporters.bundle.task_experts import lay_out_plans
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.sources.opening import ModelSource
from edgemoe_exporters.tracing.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe_exporters.sources.eager_run import EagerRun

pytestmark = pytest.mark.fused

NOTHING = 0  # bytes that may be opened as a whole


def files_of(directory: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in directory.iterdir()
        if path.name != "manifest.json"
    }


def manifest_of(directory: Path) -> Any:
    """The manifest, but for what float16 rounds elsewhere and how the graph was run."""
    content = json.loads((directory / "manifest.json").read_text())
    for task in content["tasks"].values():
        task["parity"].pop("max_abs_logit_difference")
        task["parity"].pop("reference")
        if task["quality"] is not None:
            del task["quality"]["after"]
    return content


def plan_of(*layers: list[tuple[int, ...]]) -> Plan:
    return Plan(
        method="by hand",
        layers=tuple(
            LayerPlan(
                layer=index, experts=tuple(MergedExpert(members=members) for members in experts)
            )
            for index, experts in enumerate(layers)
        ),
    )


PLANS = {
    "a": plan_of([(0,), (2,), (3, 5), (7,)], [(1,), (4,), (6,)]),
    "b": plan_of([(1,), (2,), (3, 5)], [(4,), (6,), (7,)]),
}


def compare(request: ExportRequest, tmp_path: Path) -> None:
    request = replace(request, ladder=False, speed=False)
    whole = export_bundle(replace(request, output=tmp_path / "whole"))
    streamed = export_bundle(
        replace(request, output=tmp_path / "streamed", memory_limit_bytes=NOTHING)
    )
    assert not whole.streamed
    assert streamed.streamed
    assert all(task.parity.slices > 1 for task in streamed.tasks.values())
    assert len(streamed.notes) == len(whole.notes) + 2
    assert files_of(streamed.output) == files_of(whole.output)
    assert manifest_of(streamed.output) == manifest_of(whole.output)
    for task in json.loads((streamed.output / "manifest.json").read_text())["tasks"].values():
        assert "the graph ran in" in task["parity"]["reference"]
    if request.precision == "fp32":
        for name, report in streamed.tasks.items():
            other = whole.tasks[name].parity
            assert report.parity.max_abs_logit_difference == pytest.approx(
                other.max_abs_logit_difference, abs=1e-5
            )
    assert {path.name for path in tmp_path.iterdir()} <= {"whole", "streamed", *PLAN_FILES}


PLAN_FILES = [f"{name}.json" for name in PLANS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "precision"),
    [("cpu", "fp32"), ("jetson-orin", "fp16")],
)
def test_one_task_gives_the_same_bundle(
    checkpoint: Path, tmp_path: Path, target: str, precision: str
) -> None:
    request = ExportRequest(
        model=checkpoint, output=tmp_path, target=target, precision=precision
    )
    compare(request, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("target", "precision"), [("cpu", "int4"), ("jetson-orin", "fp32")])
def test_two_plans_give_the_same_bundle(
    checkpoint: Path, tmp_path: Path, target: str, precision: str
) -> None:
    for name, plan in PLANS.items():
        plan.save(tmp_path / f"{name}.json")
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path,
        target=target,
        precision=precision,
        plans={name: tmp_path / f"{name}.json" for name in PLANS},
    )
    compare(request, tmp_path)


@pytest.mark.slow
def test_two_tasks_are_calibrated_and_evaluated_alike(
    checkpoint: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path,
        target="cpu",
        tasks=tasks,
        keep=0.5,
        max_drop=100.0,
        accept_large_drop=True,
        accept_weak_evidence=True,
    )
    compare(request, tmp_path)


def test_only_what_is_too_large_is_streamed(checkpoint: Path) -> None:
    size = 4 * sum(one.numel() for one in load_model(checkpoint).model.parameters())
    assert open_larger(checkpoint, size) is None
    assert open_larger(checkpoint, size - 1) is not None


@pytest.mark.parametrize("stopped_at", [None, 0, 1])
def test_a_streamed_pass_says_what_the_model_says(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_at: int | None,
) -> None:
    work = WorkDirectory(tmp_path)
    ran: list[int] = []
    own = edgemoe.layerwise.replay.only_layer

    def stop(decoder: Any, layers: Any, index: int) -> Any:
        if index == stopped_at and index not in ran:
            ran.append(index)
            raise KeyboardInterrupt
        ran.append(index)
        return own(decoder, layers, index)

    def ask() -> list[EagerRun]:
        model = Checkpoint(checkpoint)
        streamed = open_larger(model, NOTHING)
        assert streamed is not None
        source = ModelSource(model, streamed, work)
        with source.of_task(plan, layouts, "model") as task:
            return task.run_eager(range(60))

    whole = ModelSource(Checkpoint(checkpoint))
    plan = keep_all(whole.moe.shape)
    layouts = lay_out_plans({"model": plan}, whole.moe.shape)
    monkeypatch.setattr("edgemoe.layerwise.runner.only_layer", stop)
    if stopped_at is not None:
        with pytest.raises(KeyboardInterrupt):
            ask()
        # Layers that were finished are not run again.
        assert bool(list(tmp_path.glob("*progress.json"))) == (stopped_at > 0)
    streamed_runs = ask()
    assert ran == {None: [0, 1], 0: [0, 0, 1], 1: [0, 1, 1]}[stopped_at]
    assert list(tmp_path.iterdir()) == []
    with whole.of_task(plan, {}, "model") as task:
        expected = task.run_eager(range(60))
    for one, other in zip(streamed_runs, expected, strict=True):
        assert np.array_equal(one.logits, other.logits)
        assert np.array_equal(one.decided, other.decided)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_the_trace_does_not_depend_on_weights(family: str, tmp_path: Path) -> None:
    write_tiny_checkpoint(family, tmp_path / "tiny", num_hidden_layers=2)
    graphs = [
        trace(model)
        for model in (load_model(tmp_path / "tiny"), open_streamed(tmp_path / "tiny").moe)
    ]
    described = [
        (
            [
                (node.op_type, [value and value.name for value in node.inputs])
                for node in graph.graph
            ],
            [(name, str(value.shape)) for name, value in graph.graph.initializers.items()],
        )
        for graph in graphs
    ]
    assert described[0] == described[1]
