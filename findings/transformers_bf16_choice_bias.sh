#!/usr/bin/env bash
# Loaded in bfloat16, some MoE families keep the router's choice bias in float32, and some round it.
#
# Versions:    transformers 5.23.0, torch 2.13.0 (CPU)
# Guess:       every family keeps its choice bias (e_score_correction_bias, expert_bias) in float32.
# Behaviour:   from_pretrained(dtype=torch.bfloat16) keeps it in float32 for DeepSeek-V3, GLM-4 MoE, dots1, LFM2 and
#              others, and makes it bfloat16 for MiniMax-M2, Kimi-Linear, Laguna and AFMoE. AFMoE even lists
#              expert_bias among the modules to keep, in the list that holds for float16 only. Balanced biases
#              differ by less than bfloat16 resolves, so experts that the bias told apart become equal.
# Output seen: deepseek_v3 float32 (8 values), minimax_m2 bfloat16 (1 value left of 8 that differ by 0.001 around 8)
# For edgemoe: it loads in float32, and writes choice biases in float32. Whoever opens such a checkpoint in bfloat16
#              with transformers, to compare, compares with other experts.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    transformers==5.23.0 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
    "num_experts": 8, "num_local_experts": 8, "n_routed_experts": 8, "num_experts_per_tok": 2,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "kv_lora_rank": 32, "q_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
OWN = {
    "dots1": {"n_shared_experts": 1},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "laguna": {"num_attention_heads_per_layer": [4, 4]},
    "lfm2_moe": {"layer_types": ["full_attention"] * 2},
}
WANTED = {
    "deepseek_v3": "float32", "glm4_moe": "float32", "dots1": "float32", "lfm2_moe": "float32",
    "minimax_m2": "bfloat16", "kimi_linear": "bfloat16", "laguna": "bfloat16", "afmoe": "bfloat16",
}
print("transformers", transformers.__version__)
for family, wanted in WANTED.items():
    known = AutoConfig.for_model(family).to_dict()
    sizes = {name: value for name, value in SIZES.items() if name in known}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**sizes, **OWN.get(family, {})}))

    def bias_of(model):
        both = [*model.named_parameters(), *model.named_buffers()]
        return next(t for n, t in both if n.endswith(("e_score_correction_bias", "expert_bias")))

    with torch.no_grad():
        bias_of(model).copy_(8 + 0.001 * torch.arange(8))
    model.save_pretrained(family)
    bias = bias_of(AutoModelForCausalLM.from_pretrained(family, dtype=torch.bfloat16))
    kind = str(bias.dtype).removeprefix("torch.")
    different = len(set(bias.float().tolist()))
    print(f"{family}: {kind}, {different} different values of 8")
    assert kind == wanted and different == (8 if wanted == "float32" else 1), f"{family} changed"
PY
