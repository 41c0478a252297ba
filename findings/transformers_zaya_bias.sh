#!/usr/bin/env bash
# transformers replaces the last balancing bias of ZAYA's routers after it has loaded it.
#
# Versions:    transformers 5.24.0, torch 2.13.0 (CPU)
# Guess:       a model has the buffers that its checkpoint holds, and saving and loading one changes nothing.
# Behaviour:   `balancing_biases[-1]`, which decides how many tokens skip the experts of a layer, is -1 after loading,
#              whatever the file holds; the other biases are the file's. No message.
# Output seen: stored 0.25, loaded -1.0; others equal: True; largest difference of logits 0.012
# For edgemoe: buffers are read again from the file after loading, so a model that is loaded whole is the one that is
#              read layer by layer; logits of a ZAYA checkpoint with another last bias differ from transformers'.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
from importlib.metadata import version

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

torch.manual_seed(0)
config = AutoConfig.for_model(
    "zaya", vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, num_experts=4, moe_intermediate_size=32,
)
AutoModelForCausalLM.from_config(config).save_pretrained("model")
tensors = load_file("model/model.safetensors")
names = [name for name in tensors if name.endswith("balancing_biases")]
for name in names:
    tensors[name] = torch.linspace(-0.25, 0.25, tensors[name].numel())
save_file(tensors, "model/model.safetensors", {"format": "pt"})

model = AutoModelForCausalLM.from_pretrained("model").eval()
loaded = model.state_dict()
last = loaded[names[0]][-1].item()
same = all(torch.equal(loaded[name][:-1], tensors[name][:-1]) for name in names)
ids = torch.arange(32)[None]
with torch.no_grad():
    as_loaded = model(ids).logits
    for name, buffer in model.named_buffers():
        if name in tensors:
            buffer.copy_(tensors[name])
    as_stored = model(ids).logits
difference = (as_loaded - as_stored).abs().max().item()
print(f"stored {tensors[names[0]][-1]:.2f}, loaded {last}; others equal: {same}")
print(f"largest difference of logits {difference:.3f}")
print("transformers", version("transformers"), "torch", version("torch"))
if last != -1.0 or not same or difference == 0:
    raise SystemExit("the behaviour is another")
PY
