"""Write GGUF files of tiny checkpoints as llama.cpp's `convert_hf_to_gguf.py` does.

Names of tensors are asked of gguf-py's own map; the order of rotated pairs, stacks of experts
and keys follow the conversion script that llama-cpp-python 0.3.36 brings.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
from safetensors.torch import load_file
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

ARCHITECTURES = {
    "llama": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3",
    "qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe", "olmoe": "olmoe",
    "granitemoe": "granitemoe", "granitemoeshared": "granitemoe", "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2", "glm4_moe": "glm4moe", "dots1": "dots1", "gpt_oss": "gpt-oss",
    "minimax_m2": "minimax-m2", "phimoe": "phimoe",
}  # fmt: skip
_PAIRED = ("llama", "mixtral", "granitemoe", "granitemoeshared")
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
_NUMBERS = {
    "max_position_embeddings": "context_length", "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "vocab_size": "vocab_size",
    "intermediate_size": "feed_forward_length", "num_experts_per_tok": "expert_used_count",
    "num_experts": "expert_count", "num_local_experts": "expert_count",
    "n_routed_experts": "expert_count", "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "shared_intermediate_size": "expert_shared_feed_forward_length",
    "n_group": "expert_group_count", "topk_group": "expert_group_used_count",
    "n_shared_experts": "expert_shared_count", "sliding_window": "attention.sliding_window",
    "first_k_dense_replace": "leading_dense_block_count",
    "q_lora_rank": "attention.q_lora_rank", "kv_lora_rank": "attention.kv_lora_rank",
}  # fmt: skip
_FLOATS = {
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "routed_scaling_factor": "expert_weights_scale", "logits_scaling": "logit_scale",
    "residual_multiplier": "residual_scale", "embedding_multiplier": "embedding_scale",
    "attention_multiplier": "attention.scale",
}  # fmt: skip
_KEEP_WINDOW = ("gpt_oss", "phimoe")


def tokens(size: int) -> list[str]:
    """Return a byte-level vocabulary: three special tokens, all bytes, a merge, and padding."""
    found = ["<pad>", "<s>", "</s>", *bytes_to_unicode().values(), "th"]
    return found + [f"[PAD{index}]" for index in range(len(found), size)]


def write_gguf(
    source: Path,
    file: Path,
    *,
    store: Callable[[str], gguf.GGMLQuantizationType | None] = lambda name: None,
    keys: dict[str, Any] | None = None,
    split_tensors: int = 0,
) -> Path:
    """Write a checkpoint as GGUF.

    Args:
        source: Checkpoint directory in the published layout.
        file: What to write.
        store: Gives the type of a stored tensor by its name; None keeps float32.
        keys: Strings, numbers and lists to write besides.
        split_tensors: Tensors of each file of a split model; 0 writes one file.

    Returns:
        `file`.
    """
    config = json.loads((source / "config.json").read_text("utf-8"))
    family = config["model_type"]
    name = ARCHITECTURES[family]
    writer = gguf.GGUFWriter(file, name, split_max_tensors=split_tensors)
    for entry, key in _NUMBERS.items():
        if config.get(entry) and (key != "attention.sliding_window" or family in _KEEP_WINDOW):
            writer.add_uint32(f"{name}.{key}", config[entry])
    for entry, key in _FLOATS.items():
        if config.get(entry):
            writer.add_float32(f"{name}.{key}", config[entry])
    if config.get("norm_topk_prob") and name in ("deepseek2", "glm4moe", "dots1"):
        writer.add_bool(f"{name}.expert_weights_norm", True)
    if family in ("deepseek_v3", "glm4_moe", "dots1", "minimax_m2"):
        writer.add_uint32(f"{name}.expert_gating_func", 2)
    _write_heads(writer, name, config)
    _write_rope(writer, name, config, file)
    _write_tokens(writer, config["vocab_size"])
    for key, value in (keys or {}).items():
        # The type follows from the value.
        writer.kv_data[0].pop(key, None)
        kinds: dict[type, Any] = {
            str: writer.add_string,
            float: writer.add_float32,
            bool: writer.add_bool,
        }
        kinds.get(type(value), writer.add_uint32)(key, value)
    for stored, tensor in _tensors(source, config, name).items():
        kind = store(stored)
        content = np.ascontiguousarray(tensor.float().numpy())
        if kind is None:
            writer.add_tensor(stored, content)
        else:
            writer.add_tensor(stored, gguf.quants.quantize(content, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _write_heads(writer: gguf.GGUFWriter, name: str, config: dict[str, Any]) -> None:
    heads = config["num_attention_heads"]
    if config.get("kv_lora_rank"):
        rope, rank = config["qk_rope_head_dim"], config["kv_lora_rank"]
        writer.kv_data[0].pop(f"{name}.attention.head_count_kv", None)
        writer.add_head_count_kv(1)
        writer.add_key_length(rank + rope)
        writer.add_value_length(rank)
        writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
        writer.add_value_length_mla(config["v_head_dim"])
        writer.add_rope_dimension_count(rope)
        return
    size = config.get("head_dim") or config["hidden_size"] // heads
    if config.get("head_dim"):
        writer.add_key_length(size)
        writer.add_value_length(size)
    part = config["rope_parameters"].get("partial_rotary_factor", 1.0)
    writer.add_rope_dimension_count(int(size * part))


def _write_rope(writer: gguf.GGUFWriter, name: str, config: dict[str, Any], file: Path) -> None:
    rope = config["rope_parameters"]
    writer.add_rope_freq_base(rope["rope_theta"])
    kind = rope["rope_type"]
    if kind in ("linear", "yarn"):
        writer.add_string(f"{name}.rope.scaling.type", kind)
        writer.add_rope_scaling_factor(rope["factor"])
    if kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for entry in ("attention_factor", "beta_fast", "beta_slow"):
            if entry in rope:
                key = "attn_factor" if entry == "attention_factor" else entry
                writer.add_float32(f"{name}.rope.scaling.yarn_{key}", rope[entry])
        if "mscale_all_dim" in rope:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rope["mscale_all_dim"])
    if kind == "longrope":
        writer.add_string(f"{name}.rope.scaling.type", kind)
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        writer.add_rope_scaling_attn_factors(rope["attention_factor"])
        for length in ("long", "short"):
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    if kind == "llama3":
        size = config["head_dim"]
        wavelengths = 2 * np.pi * rope["rope_theta"] ** (np.arange(0, size, 2) / size)
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        ramp = (rope["original_max_position_embeddings"] / wavelengths - low) / (high - low)
        ramp = np.clip(ramp, 0, 1)
        divisors = 1 / ((1 - ramp) / rope["factor"] + ramp)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))


def _write_tokens(writer: gguf.GGUFWriter, size: int) -> None:
    words = tokens(size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    types = [5 if word.startswith("[PAD") else 1 for word in words]
    writer.add_token_types([3, 3, 3, *types[3:]])
    writer.add_token_merges(["t h"])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


def _tensors(source: Path, config: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    """Return tensors by their names in GGUF."""
    import torch

    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    found: dict[str, torch.Tensor] = {}
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for whole, tensor in load_file(source / "model.safetensors").items():
        one = _EXPERT.fullmatch(whole)
        if one is not None:
            stacks.setdefault(f"{one[1]}.{one[3]}", {})[int(one[2])] = tensor
            continue
        for part, content in _parts(whole, tensor, config).items():
            found[_name(names, part)] = content
    for whole, experts in stacks.items():
        content = torch.stack([experts[index] for index in range(len(experts))])
        # The conversion script calls Mixtral's stacks so.
        whole = re.sub(r"^model\.(layers\.\d+)\.block_sparse_moe", r"\1.feed_forward", whole)
        found[_name(names, whole)] = content
    return found


def _parts(whole: str, tensor: torch.Tensor, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Split or turn a tensor as the conversion script does."""
    family, layer = config["model_type"], ".".join(whole.split(".")[:3])
    for part, entry in (("q_proj", "num_attention_heads"), ("k_proj", "num_key_value_heads")):
        if f"self_attn.{part}." in whole and family in _PAIRED:
            heads = config[entry]
            apart = tensor.reshape(heads, 2, -1, *tensor.shape[1:]).transpose(1, 2)
            return {whole: apart.reshape(tensor.shape)}
    if whole.endswith("kv_b_proj.weight"):
        rank = tensor.shape[-1]
        whole_heads = tensor.reshape(config["num_attention_heads"], -1, rank)
        nope = config["qk_nope_head_dim"]
        keys, values = whole_heads[:, :nope], whole_heads[:, nope:]
        k_name = whole.replace("kv_b_proj", "k_b_proj")
        return {k_name: keys.transpose(1, 2), whole.replace("kv_b_proj", "v_b_proj"): values}
    if whole.endswith("input_linear.weight"):
        gate, up = tensor.chunk(2, dim=-2)
        stem = "exps" if "block_sparse_moe" in whole else "shexp"
        number = layer.rpartition(".")[2]
        return {
            f"blk.{number}.ffn_gate_{stem}.weight": gate,
            f"blk.{number}.ffn_up_{stem}.weight": up,
        }
    if "mlp.experts.gate_up_proj" in whole:
        kind = "bias" if whole.endswith("_bias") else "weight"
        content = tensor if kind == "bias" else tensor.transpose(-1, -2)
        stem = f"{layer}.mlp.experts"
        return {
            f"{stem}.gate_proj.{kind}": content[:, ::2],
            f"{stem}.up_proj.{kind}": content[:, 1::2],
        }
    if "mlp.experts.down_proj" in whole:
        kind = "bias" if whole.endswith("_bias") else "weight"
        content = tensor if kind == "bias" else tensor.transpose(-1, -2)
        return {f"{layer}.mlp.experts.down_proj.{kind}": content}
    return {f"{whole}.weight" if whole.endswith("sinks") else whole: tensor}


def _name(names: gguf.TensorNameMap, whole: str) -> str:
    if whole.startswith("blk."):
        return whole
    if whole.endswith("e_score_correction_bias"):
        whole += ".bias"
    found = names.get_name(whole, try_suffixes=(".weight", ".bias"))
    if found is None and whole.endswith("e_score_correction_bias.bias"):
        found = f"blk.{whole.split('.')[2]}.exp_probs_b.bias"
    assert found is not None, whole
    return str(found)
