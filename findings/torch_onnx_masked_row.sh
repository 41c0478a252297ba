#!/usr/bin/env bash
# Attention of a row whose every key is masked: torch gives 0, its ONNX export 0, NaN or the mean of all values.
#
# Versions:    torch 2.13.0 (CPU), onnxscript 0.7.0, onnxruntime 1.31.1
# Guess:       eager 0; exported to opset 20 NaN; the Attention op of opset 23 NaN too.
# Behaviour:   scaled_dot_product_attention in eager mode and the Attention op (opset 23, in onnxruntime) give 0 for
#              such a row. Exported to opset 18 or 20, a float mask of -inf gives NaN. A bool mask gives the mean of
#              all values, masked ones included: the export writes a guard (IsNaN, Where), but fills the mask with a
#              finite number, so that the softmax is uniform and the guard never acts.
# Output seen: opset 20: bool mask -> mean of V, float mask -> NaN; opset 23: 0 for both
# For edgemoe: rows of padding before a text are such rows. What they hold depends on form and opset: never compare
#              them between two forms of a model, and keep a NaN there from kernels that mix tokens, as experts do.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    torch==2.13.0 numpy==2.4.6 onnx==1.23.0 onnx-ir==1.1.0 onnxscript==0.7.0 onnxruntime==1.31.1
cd "$work"
"$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import onnxruntime
import torch
from torch.nn.functional import scaled_dot_product_attention


class Attend(torch.nn.Module):
    def forward(self, q, k, v, mask):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def say(row, values):
    if row.isnan().all():
        return "NaN"
    if (row == 0).all():
        return "0"
    return "mean of V" if torch.allclose(row, values.mean(0), atol=1e-5) else str(row)


torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 2, 4, 8).unbind()
visible = torch.ones(4, 4, dtype=torch.bool)
visible[1] = False
masks = {"bool": visible, "float": torch.zeros(4, 4).masked_fill(~visible, float("-inf"))}
print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
found = {}
for kind, mask in masks.items():
    found[kind, "eager"] = say(Attend()(q, k, v, mask)[0, 0, 1], v[0, 0])
    for opset in (18, 20, 23):
        program = torch.onnx.export(
            Attend().eval(), (q, k, v, mask), dynamo=True, opset_version=opset, verbose=False
        )
        session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
        names = [value.name for value in session.get_inputs()]
        feed = {name: value.numpy() for name, value in zip(names, (q, k, v, mask))}
        result = torch.from_numpy(session.run(None, feed)[0])
        found[kind, opset] = say(result[0, 0, 1], v[0, 0])
for (kind, how), row in found.items():
    print(f"{kind} mask, {how if how == 'eager' else f'opset {how}'}: {row}")
wanted = {("bool", 18): "mean of V", ("bool", 20): "mean of V", ("float", 18): "NaN", ("float", 20): "NaN"}
assert found == {key: wanted.get(key, "0") for key in found}, "a fully masked row changed"
PY
