#!/usr/bin/env bash
# Equal router logits: onnxruntime's fused MoE takes the highest expert id, ONNX TopK the lowest,
# torch.topk neither.
#
# Versions:    onnxruntime 1.31.1 (CPU), onnx 1.23.0, torch 2.13.0 (CPU)
# Guess:       all of them take the lowest id; the specification of TopK says so.
# Behaviour:   com.microsoft.MoE with k of 8 equal logits runs the k highest ids, TopK gives the k lowest,
#              torch.topk gives ids from the middle. In bfloat16 such ties are common: the k-th and the next
#              logit are equal for some 4% of random tokens with 64 experts and top-8, 8% with 256.
# Output seen: MoE [7] [6, 7] [5, 6, 7]; TopK [0] [0, 1] [0, 1, 2]; torch.topk of 8 zeros [6, 5, 4] for k=3
# For edgemoe: the graph decides with TopK in float32 and hands the fused op only the chosen logits, so the op never
#              breaks a tie. A bfloat16 model on torch may choose another expert than the bundle for a tied token.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    onnxruntime==1.31.1 onnx==1.23.0 numpy==2.4.6 torch==2.13.0
"$work/venv/bin/python" -I - <<'PY'
from itertools import combinations

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

EXPERTS, HIDDEN, INTER = 8, 16, 16
random = np.random.default_rng(0)
up = random.standard_normal((EXPERTS, INTER, HIDDEN)).astype(np.float32)
down = random.standard_normal((EXPERTS, HIDDEN, INTER)).astype(np.float32)
token = random.standard_normal((1, HIDDEN)).astype(np.float32)
alone = np.stack([np.maximum(token[0] @ up[e].T, 0) @ down[e].T for e in range(EXPERTS)])
logits = np.zeros((1, EXPERTS), np.float32)


def run(node, constants):
    name = node.output[-1]
    kind = TensorProto.INT64 if name == "ids" else TensorProto.FLOAT
    outputs = [helper.make_tensor_value_info(name, kind, None)]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, value.shape)
        for name, value in feed.items()
    ]
    named = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph([node], "g", inputs, outputs, named)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    return session.run(None, feed)[0][0]


print("onnxruntime", onnxruntime.__version__, "torch", torch.__version__)
for k in (1, 2, 3):
    feed = {"x": token, "logits": logits}
    node = helper.make_node(
        "MoE", ["x", "logits", "up", "", "down"], ["y"], domain="com.microsoft",
        k=k, activation_type="relu", normalize_routing_weights=1,
    )
    mixed = run(node, {"up": up, "down": down})
    fused = min(combinations(range(EXPERTS), k), key=lambda ids: abs(alone[list(ids)].mean(0) - mixed).max())
    feed = {"logits": logits}
    plain = run(helper.make_node("TopK", ["logits", "k"], ["best", "ids"]), {"k": np.array([k])})
    eager = torch.topk(torch.zeros(EXPERTS), k).indices.tolist()
    print(f"k={k}: MoE {list(fused)}, TopK {plain.tolist()}, torch.topk {eager}")
    assert list(fused) == list(range(EXPERTS - k, EXPERTS)), "MoE no longer takes the highest ids"
    assert plain.tolist() == list(range(k)), "TopK no longer takes the lowest ids"
assert sorted(eager) not in ([0, 1, 2], [5, 6, 7]), "torch.topk now takes one end"

torch.manual_seed(0)
for experts in (64, 256):
    hidden = torch.randn(20000, 512, dtype=torch.bfloat16)
    router = (torch.randn(experts, 512) / 512**0.5).bfloat16()
    best = (hidden @ router.T).float().topk(9).values
    tied = (best[:, 7] == best[:, 8]).float().mean().item()
    print(f"bfloat16, {experts} experts, top-8: {tied:.1%} of tokens tie at the border")
    assert 0.02 < tied < 0.15, "bfloat16 ties are no longer common"
PY
