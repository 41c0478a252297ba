#!/usr/bin/env bash
# torch.onnx exports scatter_reduce with "mean" as a plain overwrite, without a word.
#
# Versions:    torch 2.13.0 (CPU), onnxscript 0.7.0, onnxruntime 1.31.1; opsets 18, 20, 23
# Guess:       every reduction gives what torch gives, mean as well.
# Behaviour:   sum, prod, amax and amin are right, with include_self and without. mean becomes ScatterElements with
#              reduction "none": of several values for one place the last one stays. No error, no warning.
# Output seen: eager [3, 3.33, 3.5, 2, 2], onnxruntime [4, 6, 5, 3, 2]
# For edgemoe: statistics or routers of a new family that average by scattering would be exported wrong; only running
#              the graph against the model (the export's parity check) shows it.
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


class Scatter(torch.nn.Module):
    def __init__(self, reduction, include_self):
        super().__init__()
        self.reduction, self.include_self = reduction, include_self

    def forward(self, base, index, source):
        return base.scatter_reduce(0, index, source, self.reduction, include_self=self.include_self)


inputs = torch.full((5,), 2.0), torch.tensor([3, 1, 3, 0, 2, 1]), torch.arange(1.0, 7.0)
overwritten = torch.tensor([4.0, 6.0, 5.0, 3.0, 2.0])
print("torch", torch.__version__, "onnxruntime", onnxruntime.__version__)
for opset in (18, 20, 23):
    for reduction in ("sum", "prod", "amax", "amin", "mean"):
        for include_self in (True, False):
            module = Scatter(reduction, include_self).eval()
            program = torch.onnx.export(
                module, inputs, dynamo=True, opset_version=opset, verbose=False
            )
            session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
            names = [value.name for value in session.get_inputs()]
            feed = {name: value.numpy() for name, value in zip(names, inputs)}
            result = torch.from_numpy(session.run(None, feed)[0])
            eager = module(*inputs)
            right = torch.allclose(result, eager)
            if not right:
                shown = [round(value, 2) for value in eager.tolist()]
                print(f"opset {opset} {reduction} include_self={include_self}: {shown}, onnxruntime {result.tolist()}")
            assert right == (reduction != "mean"), f"{reduction} changed"
            assert right or torch.equal(result, overwritten), "mean is wrong in another way"
print("sum, prod, amax, amin: as in torch")
PY
