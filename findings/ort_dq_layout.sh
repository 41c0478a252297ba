#!/usr/bin/env bash
# The layout of an int4 weight decides whether onnxruntime runs it in int4, and how exactly.
#
# Versions:    onnxruntime 1.31.1 (CPU), onnx 1.23.0
# Guess:       DequantizeLinear + MatMul and DequantizeLinear + Gemm(transB=1), which is how torch stores a linear
#              layer, are both fused to MatMulNBits.
# Behaviour:   only weights as [K, N], quantised along axis 0, are fused. As [N, K] along axis 1, through a Transpose
#              or Gemm(transB=1), DequantizeLinear stays and makes a float32 weight in every call; so do stacks
#              of experts [E, K, N]. And the fused form rounds activations to int8 (accuracy level 4): the same
#              weights are 10,000 times less exact in the layout that is fast.
# Output seen: [K, N] MatMul, Gemm: MatMulNBits level 4, error 0.3; [N, K] Transpose, Gemm transB, [E, K, N]:
#              DequantizeLinear stays, error 3e-5
# For edgemoe: a standard-ONNX int4 graph (the form TensorRT reads) that falls back to onnxruntime is slow or inexact
#              by layout alone, so bundles keep a flavour with MatMulNBits and QMoE for onnxruntime.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" -I - <<'PY'
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

K, N, BLOCK = 256, 64, 32
random = np.random.default_rng(0)
weight = random.standard_normal((N, K)).astype(np.float32)
blocks = weight.reshape(N, K // BLOCK, BLOCK)
scale = (abs(blocks).max(-1) / 7).astype(np.float32)
codes = np.rint(blocks / scale[..., None]).clip(-8, 7).astype(np.int8).reshape(N, K)
x = random.standard_normal((5, K)).astype(np.float32)
exact = x @ (codes.reshape(blocks.shape) * scale[..., None]).reshape(N, K).T


def int4(array):
    flat = (array.reshape(-1) & 15).astype(np.uint8)
    data = (flat[0::2] | flat[1::2] << 4).tobytes()
    return helper.make_tensor("w", TensorProto.INT4, array.shape, data, raw=True)


def look(layout, stored, scales, axis, nodes, x=x, exact=exact):
    dequantise = helper.make_node("DequantizeLinear", ["w", "s"], ["d"], axis=axis, block_size=BLOCK)
    graph = helper.make_graph(
        [dequantise, *nodes], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [int4(stored), numpy_helper.from_array(np.ascontiguousarray(scales), "s")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = "optimised.onnx"
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    error = float(abs(session.run(None, {"x": x})[0] - exact).max())
    after = onnx.load("optimised.onnx").graph.node
    levels = [a.i for n in after for a in n.attribute if a.name == "accuracy_level"]
    print(f"{layout:24s} {sorted(n.op_type for n in after)} level {levels} error {error:.1e}")
    return "MatMulNBits" in {n.op_type for n in after}, levels, error


print("onnxruntime", onnxruntime.__version__)
multiply = helper.make_node("MatMul", ["x", "d"], ["y"])
transposed = [helper.make_node("Transpose", ["d"], ["t"]), helper.make_node("MatMul", ["x", "t"], ["y"])]
stack, scales = np.stack([codes.T] * 2), np.stack([scale.T] * 2)
fused = [
    look("[K, N] MatMul", codes.T, scale.T, 0, [multiply]),
    look("[K, N] Gemm", codes.T, scale.T, 0, [helper.make_node("Gemm", ["x", "d"], ["y"])]),
]
plain = [
    look("[N, K] Transpose, MatMul", codes, scale, 1, transposed),
    look("[N, K] Gemm transB", codes, scale, 1, [helper.make_node("Gemm", ["x", "d"], ["y"], transB=1)]),
    look("[E, K, N] MatMul", stack, scales, 1, [multiply], np.stack([x] * 2), np.stack([exact] * 2)),
]
assert all(is_fused and levels == [4] and error > 1e-2 for is_fused, levels, error in fused), "[K, N] changed"
assert all(not is_fused and error < 1e-3 for is_fused, _, error in plain), "[N, K] or [E, K, N] changed"
PY
