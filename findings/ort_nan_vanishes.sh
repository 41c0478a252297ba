#!/usr/bin/env bash
# NaN in a router row does not reach the output of onnxruntime's MoE ops, nor that of TopK.
#
# Versions:    onnxruntime 1.31.1 (CPU), onnx 1.23.0
# Guess:       a NaN logit makes the token's output NaN, and NaN is the greatest number for TopK, as in torch.
# Behaviour:   com.microsoft.MoE and QMoE return zeros for a token whose router logits are NaN (or +inf): the layer
#              contributes nothing and nothing is reported. QMoE with one NaN among the logits may ignore it and
#              answer as if that expert were not there. TopK passes over a NaN in the middle of a row.
# Output seen: MoE zeros; QMoE all NaN: zeros, one NaN: unchanged; TopK of [3, 1, NaN, 2]: [3.0, 2.0]
# For edgemoe: "the logits are finite" proves nothing about the layers before them. An overflow in a router shows as
#              lost quality only, so the export's parity check and the quality gate have to find it.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6
"$work/venv/bin/python" -I - <<'PY'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

EXPERTS, SIZE, BLOCK = 8, 32, 32
random = np.random.default_rng(0)
NAN = float("nan")


def run(node, constants, feed):
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in feed.items()
    ]
    named = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", inputs, outputs, named)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def fused(logits, quantised):
    feed = {"x": token, "logits": np.array([logits], np.float32)}
    names = ["x", "logits", "up", "s1", "", "down", "s2"] if quantised else ["x", "logits", "up", "", "down"]
    extra = {"expert_weight_bits": 4, "block_size": BLOCK, "accuracy_level": 4} if quantised else {}
    node = helper.make_node(
        "QMoE" if quantised else "MoE", names, ["y"], domain="com.microsoft", k=2,
        activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
        normalize_routing_weights=1, **extra,
    )
    return run(node, packed if quantised else plain, feed)[0]


token = random.standard_normal((1, SIZE)).astype(np.float32)
plain = {
    "up": random.standard_normal((EXPERTS, 2 * SIZE, SIZE)).astype(np.float32),
    "down": random.standard_normal((EXPERTS, SIZE, SIZE)).astype(np.float32),
}
packed = {
    "up": random.integers(0, 256, (EXPERTS, 2 * SIZE, SIZE // 2), dtype=np.uint8),
    "s1": np.full((EXPERTS, 2 * SIZE, 1), 0.1, np.float32),
    "down": random.integers(0, 256, (EXPERTS, SIZE, SIZE // 2), dtype=np.uint8),
    "s2": np.full((EXPERTS, SIZE, 1), 0.1, np.float32),
}
clean = [2.0, 1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0]
print("onnxruntime", onnxruntime.__version__)
for quantised in (False, True):
    name = "QMoE" if quantised else "MoE"
    usual = fused(clean, quantised)
    for what, logits in {"all NaN": [NAN] * 8, "+inf": [float("inf"), *clean[1:]]}.items():
        broken = fused(logits, quantised)
        print(f"{name}, {what}: largest {abs(broken).max()}, usually {abs(usual).max():.3g}")
        assert abs(usual).max() > 0 and (broken == 0).all(), f"{name} now reports {what}"
one = fused([*clean[:3], NAN, *clean[4:]], True)
print("QMoE, logit 3 of 8 NaN: same output as without:", bool((one == fused(clean, True)).all()))
assert (one == fused(clean, True)).all(), "QMoE now sees a single NaN"

row = {"x": np.array([3.0, 1.0, NAN, 2.0], np.float32)}
best = run(helper.make_node("TopK", ["x", "k"], ["y", "ids"]), {"k": np.array([2])}, row)
print("TopK, 2 of [3, 1, NaN, 2]:", best.tolist())
assert best.tolist() == [3.0, 2.0], "TopK now sees NaN"
PY
