#!/usr/bin/env bash
# `session.disable_prepacking` lets sessions share QMoE weights, but QMoE then computes something else, slowly.
#
# Versions:    onnxruntime 1.31.1 (CPU), onnx 1.23.0
# Guess:       prepacking is a layout matter: without it the outputs are bit-equal.
# Behaviour:   with prepacking (the usual way) a second session of one external-data file costs the bytes of its
#              weights again, in memory of its own. With "session.disable_prepacking" = "1" it costs nothing, as all
#              sessions map the file. But QMoE then takes another kernel, which dequantises to float32: the
#              attribute accuracy_level is without effect, outputs differ, a token takes 10 to 50 times as long.
# Output seen: 50 MB of weights; with prepacking: second session +63 MB, 0.4 ms, error 1.3e-2; without: +0 MB,
#              19.9 ms, error 3.3e-7
# For edgemoe: tasks of a bundle share weights on disk, not in memory, and this option is no way out.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6 psutil==7.2.2
cd "$work"
"$work/venv/bin/python" -I - <<'PY'
import ctypes
import gc
import time

import numpy as np
import onnx
import onnxruntime
import psutil
from onnx import TensorProto, helper, numpy_helper

EXPERTS, SIZE, BLOCK, LAYERS = 16, 512, 32, 8
random = np.random.default_rng(0)
constants, nodes, last = {}, [], "x"
for layer in range(LAYERS):
    for name, rows in (("up", 2 * SIZE), ("down", SIZE)):
        shape = (EXPERTS, rows, SIZE // 2)
        constants[f"{name}{layer}"] = random.integers(0, 256, shape, dtype=np.uint8)
        constants[f"{name}{layer}_scale"] = np.full((EXPERTS, rows, SIZE // BLOCK), 0.01, np.float32)
    weights = [f"up{layer}", f"up{layer}_scale", "", f"down{layer}", f"down{layer}_scale"]
    nodes.append(
        helper.make_node(
            "QMoE", [last, "logits", *weights], [f"y{layer}"], domain="com.microsoft", k=2,
            activation_type="swiglu", swiglu_fusion=1, activation_alpha=1.0, activation_beta=0.0,
            normalize_routing_weights=1, expert_weight_bits=4, block_size=BLOCK, accuracy_level=4,
        )
    )
    last = f"y{layer}"
feed = {
    "x": random.standard_normal((1, SIZE)).astype(np.float32),
    "logits": random.standard_normal((1, EXPERTS)).astype(np.float32),
}
graph = helper.make_graph(
    nodes, "g",
    [helper.make_tensor_value_info(k, TensorProto.FLOAT, v.shape) for k, v in feed.items()],
    [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y0", last)],
    [numpy_helper.from_array(value, name) for name, value in constants.items()],
)
opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
onnx.save(model, "m.onnx", save_as_external_data=True, location="m.data", size_threshold=1024)
weights_mb = sum(value.nbytes for name, value in constants.items() if "scale" not in name) / 1e6
del model, graph


def own_mb():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return psutil.Process().memory_full_info().uss / 1e6


def exact():
    rows = np.repeat(constants["up0_scale"], BLOCK, -1), np.repeat(constants["down0_scale"], BLOCK, -1)
    parts = []
    for packed, scale in zip((constants["up0"], constants["down0"]), rows):
        parts.append((np.stack([packed & 15, packed >> 4], -1).reshape(scale.shape).astype(float) - 8) * scale)
    best = np.argsort(-feed["logits"][0])[:2]
    gates = np.exp(feed["logits"][0, best].astype(float))
    total = 0
    for gate, expert in zip(gates / gates.sum(), best):
        mixed = feed["x"][0] @ parts[0][expert].T
        total = total + gate * (mixed[0::2] / (1 + np.exp(-mixed[0::2])) * mixed[1::2]) @ parts[1][expert].T
    return total


truth, results = exact(), {}
print("onnxruntime", onnxruntime.__version__, f"weights {weights_mb:.0f} MB in 4 bits")
for prepacking in (True, False):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.disable_prepacking", "0" if prepacking else "1")
    first = onnxruntime.InferenceSession("m.onnx", options)
    before = own_mb()
    second = onnxruntime.InferenceSession("m.onnx", options)
    more = own_mb() - before
    output = second.run(["y0"], feed)[0][0]
    times = []
    for _ in range(9):
        start = time.perf_counter()
        second.run(None, feed)
        times.append(time.perf_counter() - start)
    results[prepacking] = output, more, min(times) * 1e3
    error = abs(output - truth).max() / abs(truth).max()
    print(f"prepacking {prepacking}: second session +{more:.0f} MB, {min(times) * 1e3:.1f} ms, error {error:.1e}")
    del first, second
    assert (error > 1e-4) == prepacking, "accuracy_level is now heeded in both, or in none"
(usual, usual_mb, usual_ms), (other, other_mb, other_ms) = results[True], results[False]
assert usual_mb > weights_mb > 10 > other_mb, "sessions share memory differently now"
assert not (usual == other).all(), "outputs no longer depend on prepacking"
assert other_ms > 3 * usual_ms, "QMoE without prepacking is no longer slow"
PY
