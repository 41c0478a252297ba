#!/usr/bin/env bash
# transformers dequantises FP8 block scales with another block size where the last block is ragged, or refuses.
#
# Versions:    transformers 5.24.0, torch 2.13.0 (CPU)
# Guess:       a checkpoint with `weight_block_size: [128, 128]` is dequantised by blocks of 128, the last one being
#              narrower, as DeepSeek-V3's own code does (`kv_a_proj_with_mqa` has 576 rows, 4.5 blocks).
# Behaviour:   the block size is the weight's side divided by the number of scales: 192 rows with 2 scales are taken
#              as blocks of 96, so that rows 96 to 127 get the scale of the next block, without a message. Where the
#              side is no multiple of the number of scales (320 rows, 3 scales) loading ends with an error.
# Output seen: 256 rows: equal; 192 rows: 0.17 of the numbers wrong; 320 rows: refused
# For edgemoe: blocks are counted as announced; exactness of ragged edges is judged by the formula, not by
#              transformers.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    transformers==5.24.0 torch==2.13.0 safetensors==0.8.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

BLOCK = 128


def load(rows):
    """Load a Qwen3 whose up_proj has `rows` rows in FP8; return it as read, and as its blocks say."""
    torch.manual_seed(0)
    folder = Path(f"rows{rows}")
    config = AutoConfig.for_model(
        "qwen3", vocab_size=128, hidden_size=256, intermediate_size=rows, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=128,
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    expected = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        high, wide = tensors[name].shape
        scale = torch.rand(-(-high // BLOCK), -(-wide // BLOCK)) + 0.1
        stored = torch.randn(high, wide).to(torch.float8_e4m3fn)
        spread = scale.repeat_interleave(BLOCK, 0)[:high].repeat_interleave(BLOCK, 1)[:, :wide]
        expected[name] = (stored.float() * spread).bfloat16()
        tensors[name], tensors[f"{name}_scale_inv"] = stored, scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {
        "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    found = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    return found, expected["model.layers.0.mlp.up_proj.weight"]


seen = []
for rows in (256, 192, 320):
    try:
        found, expected = load(rows)
    except Exception as error:
        print(f"{rows} rows: {type(error).__name__}: {str(error)[:160]}")
        seen.append(None)
    else:
        wrong = (found != expected).float().mean().item()
        print(f"{rows} rows: {wrong:.2f} of the numbers differ from blocks of {BLOCK}")
        seen.append(wrong)
print("transformers", version("transformers"), "torch", version("torch"))
whole, narrow, uneven = seen
if whole != 0.0 or narrow is None or not 0.1 < narrow < 0.25 or uneven is not None:
    raise SystemExit("the behaviour is another")
PY
