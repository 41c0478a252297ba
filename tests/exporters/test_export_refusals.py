"""What an export refuses, each before the checkpoint is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnxruntime
import pytest

from edgemoe.errors import (
    EdgemoeError,
    ExportError,
    OutputError,
    PlanError,
    RecoveryError,
    TaskFileError,
)
from edgemoe.models.shapes import LayerShape, ModelShape
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.precision import check_block_sizes
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.sources import opening as source_opening
from edgemoe_exporters.validation.graph_runner import check_engine

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def keep(layer: int, *experts: int) -> LayerPlan:
    kept = tuple(MergedExpert(members=(expert,)) for expert in experts)
    return LayerPlan(layer=layer, experts=kept)


REFUSALS: list[tuple[dict[str, Any], type[EdgemoeError], str]] = [
    ({"target": "tpu"}, ExportError, "target must be one of cpu"),
    ({"precision": "int2"}, ExportError, "precision must be one of"),
    ({"target": "jetson-orin", "precision": "int4"}, ExportError, "fp16"),
    ({"keep": 0.5}, ExportError, "keep needs a task"),
    ({"keep": 1.5}, ExportError, r"keep must be in \(0, 1\]"),
    ({"keep": 0.1, "tasks": {"low": None}}, PlanError, "top_k=2"),
    ({"max_drop": 0.1}, ExportError, "max-drop needs lines"),
    ({"max_drop": -1.0, "tasks": {"low": None}}, ExportError, "max-drop must be in"),
    ({"max_drop": 2.0, "tasks": {"low": None}}, ExportError, r"For 2% give 0\.02"),
    ({"max_drop": 0.1, "tasks": {"low": None}}, TaskFileError, "3 lines judge, fewer than 20"),
    ({"keep": "auto", "tasks": {"low": None}}, ExportError, "keep auto needs a limit"),
    ({"recover": ("lora",)}, ExportError, "recover needs lines"),
    ({"recover": ("best",), "tasks": {"low": None}}, RecoveryError, "best"),
    ({"tasks": {"../x": None}}, ExportError, "a task's name"),
    ({"tasks": {"low": "short"}}, TaskFileError, "8 lines or more"),
    ({"tasks": {"low": "missing"}}, TaskFileError, "cannot be read"),
    ({"plans": {"low": "missing"}}, PlanError, "does not exist"),
    ({"plans": {"low": "few"}}, PlanError, "top_k=2"),
    ({"plans": {"low": "other"}}, PlanError, "checkpoint"),
    ({"method": "best", "tasks": {"low": None}}, PlanError, "best"),
    ({"seed": -1, "tasks": {"low": None}}, ExportError, "seed must be in"),
    ({"static_shapes": True}, ExportError, "static-shapes is for graphs of TensorRT"),
    ({"output": "exists"}, OutputError, "must not exist"),
    (
        {"output": "", "force": True, "tasks": {"low": "../outputs/exists/task"}},
        OutputError,
        "must not contain what is read",
    ),
]


@pytest.mark.fused
@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS)
def test_refusals_come_before_the_checkpoint_is_opened(
    checkpoint: Path,
    tasks: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    write_task: Callable[..., Path],
    changes: dict[str, Any],
    error: type[EdgemoeError],
    message: str,
) -> None:
    monkeypatch.setattr(
        source_opening, "load_model", lambda _: pytest.fail("the checkpoint was opened")
    )
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    write_task(inputs / "short", 3, 40, lines=7)
    few = Plan(method="by hand", layers=(keep(0, 0), keep(1, 1, 2)))
    few.save(inputs / "few")
    layers = (keep(0, 0, 1), keep(1, 1, 2))
    Plan(method="reap", layers=layers, checkpoint_sha256="0" * 64).save(inputs / "other")
    outputs = tmp_path / "outputs"
    (outputs / "exists").mkdir(parents=True)
    write_task(outputs / "exists" / "task", 3, 40)
    given = dict(changes)
    for key in ("tasks", "plans"):
        given[key] = {
            name: tasks["low"] if value is None else inputs / value
            for name, value in given.get(key, {}).items()
        }
    given["output"] = outputs / given.get("output", "bundle")
    with pytest.raises(error, match=message):
        export_bundle(ExportRequest(**{"model": checkpoint, "target": "cpu", **given}))
    assert [path.name for path in outputs.iterdir()] == ["exists"]


def test_a_hidden_size_of_no_whole_blocks_is_refused() -> None:
    layers = (LayerShape(layer=0, num_experts=4, top_k=2),)
    shape = ModelShape(family="mixtral", layers=layers, hidden_size=48, intermediate_size=24)
    for precision in ("int4", "int8"):
        with pytest.raises(ExportError, match=r"multiple of 32 .*--precision fp32"):
            check_block_sizes(shape, precision)
    for precision in ("fp32", "fp16"):
        check_block_sizes(shape, precision)


def test_an_onnxruntime_that_lacks_operators_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", "1.30.9")
    with pytest.raises(ExportError, match=r"1\.31 or later, got 1\.30\.9"):
        check_engine("ort")
    check_engine("tensorrt")
