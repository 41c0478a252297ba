#!/usr/bin/env bash
# onnxruntime lists operators of an opset whose graphs it refuses.
#
# Versions:    onnxruntime 1.31.1 (CPU), onnx 1.23.2
# Guess:       a release loads graphs of the newest opset in its list of operators: with LinearAttention of opset 27
#              in `get_all_operator_schema()`, opset 27.
# Behaviour:   1.28 to 1.31 list opset 27 and refuse every graph that is stamped with it, whatever operators it has:
#              "Opset 27 is under development ... official support for domain ai.onnx is till opset 26". Nothing in
#              the list tells such an operator from others.
# Output seen: newest listed: 27; loads 26: True; loads 27: False
# For edgemoe: the table of what release a graph needs (needs_onnxruntime) has opsets from graphs that were loaded,
#              not from the lists; operators of com.microsoft are as listed.
set -euo pipefail
unset PYTHONPATH ALLOW_RELEASED_ONNX_OPSET_ONLY
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.2 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -I - <<'PY'
import onnxruntime
from onnx import TensorProto, helper
from onnxruntime.capi import onnxruntime_pybind11_state as core

onnxruntime.set_default_logger_severity(4)


def loads(opset):
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", value[:1], value[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    try:
        onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception as error:
        assert f"Opset {opset} is under development" in str(error), error
        return False
    return True


listed = {schema.name: schema.since_version for schema in core.get_all_operator_schema() if not schema.domain}
print("onnxruntime", onnxruntime.__version__)
print(f"newest listed: {max(listed.values())}; loads 26: {loads(26)}; loads 27: {loads(27)}")
assert max(listed.values()) == 27 and listed["LinearAttention"] == 27, "the list changed"
assert loads(26) and not loads(27), "what is loaded changed"
PY
