#!/usr/bin/env bash
# transformers opens a Mixtral GGUF as a dense Llama whose feed-forward layers are random.
#
# Versions:    transformers 5.23.0, gguf 0.19.0, torch 2.13.0 (CPU)
# Guess:       a GGUF of architecture "llama" with experts becomes Mixtral or is refused; one of "qwen3moe" loads with
#              whatever width its experts have.
# Behaviour:   Mixtral's GGUFs say architecture "llama" and expert_count. transformers maps "llama" to
#              LlamaForCausalLM, passes over the experts, and fills mlp.gate_proj, up_proj and down_proj with random
#              numbers: a table in the log says MISSING, nothing is raised. For "qwen3moe" it does not read
#              expert_feed_forward_length: the width is the default of Qwen3MoeConfig (768), any other is refused.
# Output seen: LlamaForCausalLM, 6 missing tensors (3 per layer), no exception; qwen3moe with width 32: RuntimeError
# For edgemoe: it reads GGUF itself (edgemoe/models/gguf), experts and their width included.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    transformers==5.23.0 gguf==0.19.0 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import gguf
import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM

LAYERS, HIDDEN, HEADS, EXPERTS, WIDTH, WORDS = 2, 64, 4, 4, 32, 96
random = np.random.default_rng(0)


def write(file, architecture, norms=()):
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(WIDTH)
    writer.add_expert_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_key_length(HIDDEN // HEADS)
    writer.add_value_length(HIDDEN // HEADS)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(WORDS)
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(2)

    def add(name, *shape):
        writer.add_tensor(name, random.standard_normal(shape).astype(np.float32))

    add("token_embd.weight", WORDS, HIDDEN)
    add("output_norm.weight", HIDDEN)
    add("output.weight", WORDS, HIDDEN)
    for layer in range(LAYERS):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{layer}.{name}.weight", HIDDEN, HIDDEN)
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{layer}.{name}.weight", HIDDEN)
        for name in norms:
            add(f"blk.{layer}.{name}.weight", HIDDEN // HEADS)
        add(f"blk.{layer}.ffn_gate_inp.weight", EXPERTS, HIDDEN)
        for name in ("ffn_gate_exps", "ffn_up_exps"):
            add(f"blk.{layer}.{name}.weight", EXPERTS, WIDTH, HIDDEN)
        add(f"blk.{layer}.ffn_down_exps.weight", EXPERTS, HIDDEN, WIDTH)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def load(file):
    return AutoModelForCausalLM.from_pretrained(
        ".", gguf_file=file, dtype=torch.float32, output_loading_info=True
    )


print("transformers", transformers.__version__)
write("mixtral.gguf", "llama")
model, report = load("mixtral.gguf")
missing = sorted(report["missing_keys"])
print(f"mixtral: {type(model).__name__}, {len(missing)} missing tensors, such as {missing[0]}")
assert type(model).__name__ == "LlamaForCausalLM", "experts are seen now"
assert len(missing) == 3 * LAYERS and all(".mlp." in name for name in missing), "other tensors miss"
gate = [load("mixtral.gguf")[0].model.layers[0].mlp.gate_proj.weight for _ in range(2)]
print("loaded twice, the same weights:", torch.equal(*gate))
assert not torch.equal(*gate), "the weights are no longer random"

write("qwen3.gguf", "qwen3moe", norms=("attn_q_norm", "attn_k_norm"))
try:
    load("qwen3.gguf")
except RuntimeError as error:
    print(f"qwen3moe with experts of width {WIDTH}: RuntimeError: {str(error)[:60]}")
else:
    raise SystemExit("qwen3moe now reads expert_feed_forward_length")
PY
