"""A graph needs the first release of onnxruntime that has all of its parts."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from onnxruntime.capi import onnxruntime_pybind11_state as onnxruntime_core

from edgemoe.errors import ExportError
from edgemoe_exporters.bundle.engine_release import OPERATORS, needed_onnxruntime
from edgemoe_exporters.graph.metadata import MICROSOFT


def model_of(*nodes: ir.Node, opset: int = 20, ir_version: int = 10) -> ir.Model:
    opsets = {"": opset, MICROSOFT: 1}
    graph = ir.Graph((), (), nodes=nodes, opset_imports=opsets, name="graph")
    return ir.Model(graph, ir_version=ir_version)


def node(op: str, inputs: int = 1, **attributes: int) -> ir.Node:
    values = [ir.Value(name=f"input{number}") for number in range(inputs)]
    made = [ir.AttrInt64(name, value) for name, value in attributes.items()]
    return ir.Node(MICROSOFT, op, values, made)


@pytest.mark.parametrize(
    ("nodes", "needed"),
    [
        ((), "1.23"),
        ((node("MatMulNBits", bits=4, accuracy_level=4),), "1.23"),
        ((node("LinearAttention"), node("QuickGelu")), "1.25"),
        ((node("MoE", k=2), node("LinearAttention")), "1.28"),
        ((node("QMoE", k=2, expert_weight_bits=4),), "1.28"),
        ((node("QMoE", k=2, accuracy_level=4), node("MoE")), "1.31"),
    ],
)
def test_the_newest_part_decides(nodes: tuple[ir.Node, ...], needed: str) -> None:
    assert needed_onnxruntime(model_of(*nodes)) == needed


def test_parts_of_subgraphs_count() -> None:
    inner = ir.Graph((), (), nodes=[node("QMoE", accuracy_level=4)], name="then")
    branch = ir.Node("", "If", [ir.Value(name="which")], [ir.AttrGraph("then_branch", inner)])
    assert needed_onnxruntime(model_of(branch)) == "1.31"


def test_opset_and_ir_version_count() -> None:
    assert needed_onnxruntime(model_of(opset=24)) == "1.24"
    assert needed_onnxruntime(model_of(ir_version=14)) == "1.32"
    with pytest.raises(ExportError, match="got opset 99"):
        needed_onnxruntime(model_of(opset=99))


@pytest.mark.parametrize(
    ("unknown", "named"),
    [
        (node("Magic"), "Magic with 1 inputs"),
        (node("QuickGelu", 2), "QuickGelu with 2 inputs"),
        (
            node("MoE", swiglu_limit_after_activation=1),
            "MoE with swiglu_limit_after_activation",
        ),
    ],
)
def test_what_no_release_is_known_for_is_not_written(unknown: ir.Node, named: str) -> None:
    with pytest.raises(ExportError, match=rf"got {named}\. This is a defect"):
        needed_onnxruntime(model_of(unknown))


@pytest.mark.fused
def test_the_installed_onnxruntime_has_what_the_table_says() -> None:
    schemas = {
        schema.name: schema
        for schema in onnxruntime_core.get_all_operator_schema()
        if schema.domain == MICROSOFT
    }
    for name, operator in OPERATORS.items():
        attributes = {*operator.attributes.split(), *operator.later}
        assert attributes <= set(schemas[name].attributes), name
        assert operator.inputs <= len(schemas[name].inputs), name
