#!/usr/bin/env bash
# A checkpoint saved by transformers 5 has its rotary base where mlx-lm does not look.
#
# Versions:    mlx-lm 0.32.2, mlx 0.32.4 (CPU), transformers 5.23.0, torch 2.13.0 (CPU)
# Guess:       mlx-lm gives the logits of transformers (1e-4) for MoE families that both know.
# Behaviour:   transformers 5 writes config.json with rope_parameters: {"rope_theta": ...} and no rope_theta beside it,
#              also for a checkpoint that came with the old form. mlx-lm reads rope_theta alone. Qwen3-MoE is refused
#              (TypeError, missing argument); Qwen2-MoE takes mlx-lm's own default of 1,000,000 without a word, so the
#              first token is right and later ones are not. With rope_theta written back the logits agree.
# Output seen: qwen2_moe, base 10000: difference 1e-06 at token 0, 0.9 standard deviations later; with rope_theta
#              added 4e-06 everywhere; qwen3_moe: TypeError ... 'rope_theta'
# For edgemoe: `apply` saves through transformers 5, so a pruned checkpoint needs "rope_theta" (and rope_scaling, where
#              the rotary is scaled) added to config.json before mlx-lm opens it.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.23.0 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import json
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.utils import load_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2, "initializer_range": 0.2,
}
TOKENS = [[5, 9, 33, 17, 2, 40, 41, 8]]
mx.set_default_device(mx.cpu)
print("mlx-lm", version("mlx-lm"), "transformers", version("transformers"))


def make(family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, rope_theta=10000.0)  # the old form
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(family)
    with torch.no_grad():
        return model(torch.tensor(TOKENS)).logits[0].numpy()


def compare(family, logits):
    model, _ = load_model(Path(family))
    found = np.array(model(mx.array(TOKENS))[0].astype(mx.float32))
    return abs(found - logits).max(-1) / logits.std()


logits = make("qwen2_moe")
file = Path("qwen2_moe/config.json")
config = json.loads(file.read_text())
print("config.json:", {name: config.get(name) for name in ("rope_parameters", "rope_theta")})
assert "rope_theta" not in config and config["rope_parameters"]["rope_theta"] == 10000.0, "another config.json"
silent = compare("qwen2_moe", logits)
print(f"qwen2_moe as saved: difference {silent[0]:.0e} at token 0, {silent.max():.1f} deviations at most")
assert silent[0] < 1e-4 and silent.max() > 0.1, "mlx-lm now reads rope_parameters"
file.write_text(json.dumps({**config, "rope_theta": 10000.0}))
told = compare("qwen2_moe", logits)
print(f"qwen2_moe with rope_theta: {told.max():.0e}")
assert told.max() < 1e-4, "the difference has another cause"

logits = make("qwen3_moe")
try:
    compare("qwen3_moe", logits)
except TypeError as error:
    print("qwen3_moe as saved: TypeError:", error)
    assert "rope_theta" in str(error), "refused for another reason"
else:
    raise SystemExit("qwen3_moe now opens")
PY
