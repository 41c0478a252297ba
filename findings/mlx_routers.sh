#!/usr/bin/env bash
# mlx-lm routes Jamba and ERNIE 4.5 MoE otherwise than the models were trained.
#
# Versions:    mlx-lm 0.32.2, mlx 0.32.4 (CPU), transformers 5.23.0, torch 2.13.0 (CPU)
# Guess:       routing is what a port gets right first: the same experts and weights as in transformers.
# Behaviour:   Jamba uses the softmax over all experts as it is; mlx-lm takes the softmax over the chosen ones, so
#              their weights sum to one and the layer adds more. ERNIE 4.5 chooses experts by softmax plus a
#              correction bias; mlx-lm drops the bias at loading. Mixtral, run beside them, agrees. Each of the two
#              agrees as well once transformers is made to do the same (k = all experts; bias 0).
# Output seen: mixtral 2e-06, jamba 0.5 deviations (with k = all experts 4e-06), ernie4_5_moe 1 (with bias 0 2e-06)
# For edgemoe: a Jamba or ERNIE checkpoint that looks bad in mlx-lm after pruning may be bad there before it as well:
#              compare the unpruned model in both first.
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
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
JAMBA = {
    "num_experts": 8, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
    "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
}
ERNIE = {"moe_num_experts": 8, "moe_k": 2, "moe_intermediate_size": 32, "moe_num_shared_experts": 1}
TOKENS = [[5, 9, 33, 17, 2, 40, 41, 8]]
mx.set_default_device(mx.cpu)


def difference(name, family, bias=0.0, **own):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **own})).eval()
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("e_score_correction_bias"):
                tensor.copy_(bias * torch.randn_like(tensor))
        logits = model(torch.tensor(TOKENS)).logits[0].numpy()
    model.save_pretrained(name)
    file = Path(name, "config.json")
    config = json.loads(file.read_text())
    # mlx-lm wants the rotary base at the top of config.json: see mlx_rope_base.sh.
    file.write_text(json.dumps({"rope_theta": (config.get("rope_parameters") or {}).get("rope_theta"), **config}))
    ported, _ = load_model(Path(name))
    found = np.array(ported(mx.array(TOKENS))[0].astype(mx.float32))
    worst = float(abs(found - logits).max() / logits.std())
    print(f"{name}: {worst:.0e} deviations")
    return worst


print("mlx-lm", version("mlx-lm"), "transformers", version("transformers"))
same = [
    difference("mixtral", "mixtral", num_local_experts=8),
    difference("jamba, k = all experts", "jamba", **{**JAMBA, "num_experts": 2}),
    difference("ernie4_5_moe, bias 0", "ernie4_5_moe", **ERNIE),
]
other = [
    difference("jamba", "jamba", **JAMBA),
    difference("ernie4_5_moe", "ernie4_5_moe", bias=0.3, **ERNIE),
]
assert max(same) < 1e-4, "the differences have other causes"
assert min(other) > 0.05, "mlx-lm routes like transformers now"
PY
