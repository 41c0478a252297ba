#!/usr/bin/env bash
# TensorRT-RTX turns float64 inputs and outputs of an ONNX model into float32 bindings without a message.
#
# Versions:    tensorrt-rtx 1.7.1.116, onnx 1.23.0; no GPU is needed to build
# Guess:       a float64 input is refused, as uint8 inputs are by most operators; a float64 constant is cast with a
#              warning.
# Behaviour:   a strongly typed network with DOUBLE inputs and outputs parses and builds. The bindings are FLOAT, at
#              half the bytes; the VERBOSE log calls them float32 as if they had been. An int64 input, which is kept as it
#              is, does get a message. A constant beyond float32 is clamped, with a warning.
# Output seen: x DOUBLE -> DataType.FLOAT, y DOUBLE -> DataType.FLOAT, 0 messages about the type
# For edgemoe: its graphs hold no float64, but a program that binds buffers by the types of the ONNX file would hand over
#              8-byte numbers as 4-byte ones. Sizes have to come from the engine, or be compared with it.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check tensorrt-rtx==1.7.1.116 onnx==1.23.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -I - <<'PY'
import onnx
import tensorrt_rtx as trt
from onnx import TensorProto, helper


class Log(trt.ILogger):
    def __init__(self):
        trt.ILogger.__init__(self)
        self.lines = []

    def log(self, severity, text):
        self.lines.append((severity, text))


def build(kind):
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    x, y = (helper.make_tensor_value_info(name, kind, [4, 16]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    assert parser.parse(model.SerializeToString()), "refused by the parser now"
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, "refused by the builder now"
    words = ("double", "float64", "binding")
    said = [text for _, text in log.lines if any(word in text.lower() for word in words)]
    return network.get_input(0).dtype, network.get_output(0).dtype, said


print("tensorrt-rtx", trt.__version__)
source, result, said = build(TensorProto.DOUBLE)
print(f"x DOUBLE -> {source}, y DOUBLE -> {result}, {len(said)} messages about the type")
assert (source, result) == (trt.float32, trt.float32), "float64 becomes something else now"
assert not said, f"TensorRT-RTX now says: {said[0]}"
source, result, said = build(TensorProto.INT64)
print(f"x INT64 -> {source}, y INT64 -> {result}, {len(said)} messages, such as: {said[0]}")
assert (source, result) == (trt.int64, trt.int64) and said, "int64 is treated otherwise now"
PY
