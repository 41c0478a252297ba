"""Bundles of hand-made graphs: what is stored once, and what each graph reads back."""

from __future__ import annotations

import hashlib
import json
import shutil
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.errors import ExportError, OutputError
from edgemoe_exporters.bundle import writer as bundle
from edgemoe_exporters.bundle.expert_layout import lay_out
from edgemoe_exporters.bundle.weight_store import ALIGNMENT_BYTES
from edgemoe_exporters.bundle.writer import (
    BundleWriter,
    copy_model_files,
    list_files,
    tensor_specs,
)

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe_runtime.bundle.file_entry import SizeReport

Array = np.ndarray[Any, Any]
HIDDEN = 16
ALL_EXPERTS = np.random.default_rng(0).standard_normal((16, HIDDEN, HIDDEN), dtype=np.float32)
BACKBONE = np.random.default_rng(1).standard_normal((HIDDEN, HIDDEN), dtype=np.float32)


def make_model(experts: Array, backbone: Array = BACKBONE) -> ir.Model:
    """y = sum over experts of x @ backbone @ expert."""
    x = ir.Value(
        name="x", shape=ir.Shape(["rows", HIDDEN]), type=ir.TensorType(ir.DataType.FLOAT)
    )
    b = ir.Value(name="backbone", const_value=ir.tensor(backbone, name="backbone"))
    stack = ir.Value(
        name="layers.3.experts", const_value=ir.tensor(experts, name="layers.3.experts")
    )
    stack.metadata_props.update({"edgemoe.expert_axis": "0", "edgemoe.layer": "3"})
    axes = ir.Value(name="axes", const_value=ir.tensor([0], name="axes"))
    first = ir.node(
        "MatMul", [x, b], metadata_props={"pkg.torch.stack": "/home/someone/model.py"}
    )
    second = ir.node("MatMul", [first.outputs[0], stack])
    total = ir.node("ReduceSum", [second.outputs[0], axes], attributes={"keepdims": 0})
    y = total.outputs[0]
    y.name, y.type, y.shape = "y", x.type, ir.Shape(["rows", HIDDEN])
    graph = ir.Graph(
        [x],
        [y],
        nodes=[first, second, total],
        initializers=[b, stack, axes],
        opset_imports={"": 18},
        name="tiny",
    )
    return ir.Model(graph, ir_version=10)


def write(
    directory: Path, selections: dict[str, list[int]], *, stack: bool = True
) -> tuple[SizeReport, dict[str, Array]]:
    directory.mkdir()
    layouts = {3: lay_out(selections)}
    orders = {
        task: np.array(layouts[3].experts_of(task)) if stack else np.sort(selections[task])
        for task in selections
    }
    with BundleWriter(directory, list(selections), layouts if stack else None) as writer:
        for task, order in orders.items():
            writer.add_graph(task, make_model(ALL_EXPERTS[order]))
        size = writer.finish()
        assert writer.separate_stacks == []
    return size, orders


def read_back(directory: Path, task: str) -> dict[str, Array]:
    model = onnx.load(directory / f"{task}.onnx")
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


chosen = st.lists(st.integers(0, 15), min_size=1, max_size=16, unique=True)


@given(selections=st.dictionaries(st.sampled_from(["a", "b", "c", "d"]), chosen, min_size=1))
@settings(max_examples=25, deadline=None)
def test_every_task_reads_back_exactly_its_tensors(
    tmp_path_factory: pytest.TempPathFactory, selections: dict[str, list[int]]
) -> None:
    directory = tmp_path_factory.mktemp("bundle") / "b"
    _, orders = write(directory, selections)
    for task, order in orders.items():
        tensors = read_back(directory, task)
        np.testing.assert_array_equal(tensors["layers.3.experts"], ALL_EXPERTS[order])
        np.testing.assert_array_equal(tensors["backbone"], BACKBONE)


@given(first=chosen, second=chosen)
@settings(max_examples=25, deadline=None)
def test_two_tasks_take_the_bytes_of_the_union(
    tmp_path_factory: pytest.TempPathFactory, first: list[int], second: list[int]
) -> None:
    directory = tmp_path_factory.mktemp("bundle") / "b"
    write(directory, {"a": first, "b": second})
    stored = sum(path.stat().st_size for path in directory.glob("*.onnx.data"))
    union = len(set(first) | set(second)) * ALL_EXPERTS[0].nbytes + BACKBONE.nbytes
    assert union <= stored < union + 3 * ALIGNMENT_BYTES


def test_engine_computes_the_same_from_overlapping_ranges(tmp_path: Path) -> None:
    _, orders = write(tmp_path / "b", {"a": [0, 1, 2, 3, 9], "b": [2, 3, 5], "c": [7]})
    x = np.ones((2, HIDDEN), np.float32)
    for task, order in orders.items():
        session = onnxruntime.InferenceSession(tmp_path / "b" / f"{task}.onnx")
        (got,) = session.run(None, {"x": x})
        want = (x @ BACKBONE @ ALL_EXPERTS[order]).sum(0)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_what_one_task_reads_is_in_its_own_file(tmp_path: Path) -> None:
    size, _ = write(tmp_path / "b", {"a": [0, 1], "b": [2, 3]})
    files = {path.name: path.stat().st_size for path in (tmp_path / "b").iterdir()}
    assert files.keys() == {
        "a.onnx",
        "b.onnx",
        "a.onnx.data",
        "b.onnx.data",
        "shared.onnx.data",
    }
    assert files["shared.onnx.data"] == BACKBONE.nbytes == size.shared_bytes
    assert files["a.onnx.data"] == 2 * ALL_EXPERTS[0].nbytes
    assert size.task_bytes["a"] == files["a.onnx"] + files["a.onnx.data"]
    assert size.total_bytes == sum(files.values())


def test_one_unnamed_task_is_model_onnx(tmp_path: Path) -> None:
    write(tmp_path / "b", {"model": [0, 1]}, stack=False)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == [
        "model.onnx",
        "model.onnx.data",
    ]


def test_offsets_are_aligned_and_inside_the_file(tmp_path: Path) -> None:
    write(tmp_path / "b", {"a": [0, 1, 2], "b": [2, 4]})
    proto = onnx.load(tmp_path / "b" / "b.onnx", load_external_data=False)
    for tensor in proto.graph.initializer:
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            path = tmp_path / "b" / external["location"]
            assert int(external["offset"]) % 64 == 0
            assert int(external["offset"]) + int(external["length"]) <= path.stat().st_size
        else:
            assert tensor.name == "axes"


def test_experts_that_differ_between_tasks_are_stored_apart(tmp_path: Path) -> None:
    layouts = {3: lay_out({"a": [0, 1], "b": [1, 2]})}
    rescaled = ALL_EXPERTS[[1, 2]] * 2
    with BundleWriter(tmp_path, ["a", "b"], layouts) as writer:
        writer.add_graph("a", make_model(ALL_EXPERTS[[0, 1]]))
        writer.add_graph("b", make_model(rescaled))
        writer.finish()
        assert writer.separate_stacks == ["b: layers.3.experts"]
    np.testing.assert_array_equal(
        read_back(tmp_path, "a")["layers.3.experts"], ALL_EXPERTS[[0, 1]]
    )
    np.testing.assert_array_equal(read_back(tmp_path, "b")["layers.3.experts"], rescaled)
    assert (tmp_path / "a.onnx.data").stat().st_size == 2 * ALL_EXPERTS[0].nbytes


def test_same_graphs_give_the_same_bytes_and_no_paths(tmp_path: Path) -> None:
    selections = {"a": [0, 1, 2], "b": [2, 4]}
    write(tmp_path / "one", selections)
    write(tmp_path / "two", selections)
    assert list_files(tmp_path / "one") == list_files(tmp_path / "two")
    assert b"someone" not in (tmp_path / "one" / "a.onnx").read_bytes()


def test_files_are_listed_with_their_digests(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "config.json").write_bytes(b"abc")
    entry = list_files(tmp_path)
    assert list(entry) == ["config.json"]
    assert entry["config.json"].sha256 == hashlib.sha256(b"abc").hexdigest()
    assert entry["config.json"].size == 3


def test_inputs_are_described_with_their_dynamic_dimensions() -> None:
    (spec,) = tensor_specs(make_model(ALL_EXPERTS[:1]).graph.inputs)
    assert (spec.name, spec.dtype, spec.shape) == ("x", "float32", ("rows", HIDDEN))


def test_input_with_a_default_may_be_left_out(tmp_path: Path) -> None:
    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    cap = ir.Value(name="k_cap", shape=ir.Shape([1]), type=x.type)
    node = ir.node("Add", [x, cap])
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = "y", x.type, x.shape
    graph = ir.Graph([x, cap], node.outputs, nodes=[node], opset_imports={"": 18}, name="sum")
    model = ir.Model(graph, ir_version=10)
    bundle.set_default_input(model, "k_cap", [6])
    with BundleWriter(tmp_path, ["model"]) as writer:
        writer.add_graph("model", model)
        writer.finish()
    assert [spec.name for spec in tensor_specs(graph.inputs)] == ["x", "k_cap"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    assert session.run(None, {"x": np.array([1])})[0] == [7]
    assert session.run(None, {"x": np.array([1]), "k_cap": np.array([2])})[0] == [3]


def test_full_disk_is_refused_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = SimpleNamespace(free=9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with (
        BundleWriter(tmp_path, ["model"]) as writer,
        pytest.raises(OutputError, match="kB free"),
    ):
        writer.add_graph("model", make_model(ALL_EXPERTS))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("tasks", [[], ["a", "A"], ["shared"], ["../x"], [""], ["a/b"]])
def test_task_names_that_cannot_be_files_are_refused(tmp_path: Path, tasks: list[str]) -> None:
    with pytest.raises(ExportError, match="task"):
        BundleWriter(tmp_path, tasks)


def test_stack_that_does_not_fit_its_layout_is_refused(tmp_path: Path) -> None:
    layouts = {3: lay_out({"a": [0, 1]})}
    with (
        BundleWriter(tmp_path, ["a"], layouts) as writer,
        pytest.raises(ExportError, match="first axis"),
    ):
        writer.add_graph("a", make_model(ALL_EXPERTS[:3]))


def test_checkpoint_without_tokenizer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({}))
    (tmp_path / "out").mkdir()
    with pytest.raises(ExportError, match=r"tokenizer\.json"):
        copy_model_files(tmp_path, tmp_path / "out")
