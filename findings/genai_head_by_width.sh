#!/usr/bin/env bash
# onnxruntime-genai's builder takes any linear layer as wide as the vocabulary for the LM head.
#
# Versions:    onnxruntime-genai 0.18.0, onnxruntime 1.31.1 (CPU), transformers 5.23.0, torch 2.13.0 (CPU)
# Guess:       the graph of a small random LFM2-MoE, `-p fp32 -e cpu`, gives the logits of transformers (1e-4).
# Behaviour:   it does, unless a feed-forward width equals the vocabulary size: then gate_proj and up_proj of a dense
#              layer are written as lm_head, and the logits come from the middle of the model. The builder ends
#              with success. With a vocabulary of one word more the same model is right.
# Output seen: vocabulary 96, width 96: logits 3 deviations off; vocabulary 97: 2e-06
# For edgemoe: test models that are shared with genai need a vocabulary unlike every width; edgemoe's own tiny test
#              models have 96 for both.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    onnxruntime-genai==0.18.0 onnxruntime==1.31.1 onnx==1.23.0 onnx-ir==1.1.0 \
    transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2,
    "num_dense_layers": 1, "layer_types": ["full_attention"] * 2, "block_auto_adjust_ff_dim": False,
    "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}
TOKENS = np.array([[5, 9, 33, 17, 2, 40, 41, 8]])


def difference(vocabulary):
    torch.manual_seed(0)
    folder, graph = Path(f"model{vocabulary}"), Path(f"graph{vocabulary}")
    config = AutoConfig.for_model("lfm2_moe", vocab_size=vocabulary, **SIZES)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(vocabulary)}, "w0")).save(str(folder / "tokenizer.json"))
    file = folder / "config.json"
    # The builder reads the rotary base at the top of config.json.
    saved = json.loads(file.read_text())
    file.write_text(json.dumps({**saved, "rope_theta": saved["rope_parameters"]["rope_theta"]}))
    build = [sys.executable, "-I", "-m", "onnxruntime_genai.models.builder", "-p", "fp32", "-e", "cpu"]
    subprocess.run([*build, "-i", folder, "-o", graph, "-c", "cache"], check=True, stdout=sys.stderr)
    session = onnxruntime.InferenceSession(graph / "model.onnx")
    feed = {"input_ids": TOKENS, "attention_mask": np.ones_like(TOKENS)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            feed[value.name] = np.zeros((1, 2, 0, 16), np.float32)
    found = session.run(["logits"], feed)[0][0]
    with torch.no_grad():
        logits = model(torch.from_numpy(TOKENS)).logits[0].numpy()
    worst = float(abs(found - logits).max() / logits.std())
    print(f"vocabulary {vocabulary}, width 96: difference {worst:.0e} deviations")
    return worst


print("onnxruntime-genai", version("onnxruntime-genai"), "onnxruntime", onnxruntime.__version__)
assert difference(97) < 1e-4, "the builder is wrong for another reason"
assert difference(96) > 0.1, "the builder finds the head by another way now"
PY
