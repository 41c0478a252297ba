"""The entries of config.json that a family has of its own, read from a GGUF's keys."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe.models.gguf.metadata import Metadata


def _entries(metadata: Metadata, names: Mapping[str, str], kind: type = int) -> dict[str, Any]:
    return {entry: metadata.take(key, kind) for key, entry in names.items()}


def _routed(metadata: Metadata, experts: str = "num_experts") -> dict[str, Any]:
    names = {"expert_count": experts, "expert_used_count": "num_experts_per_tok"}
    return _entries(metadata, names)


def _expert_width(metadata: Metadata) -> int:
    # Files from before the key had the width of all experts that a token uses.
    whole = metadata.take("feed_forward_length", int, 0)
    used = metadata.take("expert_used_count", int)
    return metadata.take("expert_feed_forward_length", int, whole // used)


def _has(metadata: Metadata, part: str) -> bool:
    """Return whether a decoder layer has a tensor."""
    return any(
        name.startswith("blk.") and name.endswith(f".{part}")
        for name in metadata.container.blocks
    )


def dense(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of Llama."""
    return {
        "attention_bias": _has(metadata, "attn_output.bias"),
        "mlp_bias": _has(metadata, "ffn_down.bias"),
    }


def mixtral(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of Mixtral."""
    width = metadata.take("feed_forward_length", int)
    metadata.expect("expert_feed_forward_length", width)
    # llama.cpp divides by the sum of the chosen weights in any case, and so does the family.
    metadata.expect("expert_weights_norm", True, False)
    return _routed(metadata, "num_local_experts")


def qwen2_moe(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of Qwen2-MoE."""
    width = _expert_width(metadata)
    return {
        **_routed(metadata),
        "moe_intermediate_size": width,
        "shared_expert_intermediate_size": metadata.take(
            "expert_shared_feed_forward_length", int, metadata.take("feed_forward_length", int)
        ),
        "norm_topk_prob": metadata.take("expert_weights_norm", bool, False),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "use_sliding_window": False,
    }


def qwen3(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of Qwen3."""
    return {"attention_bias": _has(metadata, "attn_output.bias"), "use_sliding_window": False}


def qwen3_moe(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of Qwen3-MoE."""
    return {
        **_routed(metadata),
        **qwen3(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "norm_topk_prob": metadata.take("expert_weights_norm", bool, True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def olmoe(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of OLMoE."""
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    return {
        **_routed(metadata),
        "norm_topk_prob": metadata.take("expert_weights_norm", bool, False),
        "clip_qkv": metadata.take("attention.clamp_kqv", float, 0.0) or None,
        "attention_bias": _has(metadata, "attn_output.bias"),
    }


def granite(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of GraniteMoE, with shared experts or without."""
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    head = metadata.take("embedding_length", int) // metadata.take("attention.head_count", int)
    found = {
        **_routed(metadata, "num_local_experts"),
        "logits_scaling": metadata.take("logit_scale", float, 0.0) or 1.0,
        "residual_multiplier": metadata.take("residual_scale", float, 0.0) or 1.0,
        "embedding_multiplier": metadata.take("embedding_scale", float, 0.0) or 1.0,
        # Without the key llama.cpp divides by the root of the head's size.
        "attention_multiplier": metadata.take("attention.scale", float, 0.0) or head**-0.5,
        "attention_bias": _has(metadata, "attn_output.bias"),
    }
    if shared := metadata.take("expert_shared_feed_forward_length", int, 0):
        found["shared_intermediate_size"] = shared
    return found


def _grouped(metadata: Metadata) -> dict[str, Any]:
    """Read routing over groups of experts, with some experts that each token uses."""
    return {
        **_routed(metadata, "n_routed_experts"),
        "moe_intermediate_size": _expert_width(metadata),
        "n_shared_experts": metadata.take("expert_shared_count", int, 0),
        "first_k_dense_replace": metadata.take("leading_dense_block_count", int, 0),
        "routed_scaling_factor": metadata.take("expert_weights_scale", float, 0.0) or 1.0,
        "norm_topk_prob": metadata.take("expert_weights_norm", bool, False),
        "n_group": metadata.take("expert_group_count", int, 0) or 1,
        "topk_group": metadata.take("expert_group_used_count", int, 0) or 1,
    }


def glm4_moe(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of GLM-4.5."""
    metadata.expect("expert_gating_func", 2, 0)
    return {
        **_grouped(metadata),
        "use_qk_norm": _has(metadata, "attn_q_norm.weight"),
        "attention_bias": _has(metadata, "attn_q.bias"),
        "num_nextn_predict_layers": 0,
    }


def dots1(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of dots.llm1."""
    metadata.expect("expert_gating_func", 2)
    return {**_grouped(metadata), "sliding_window": None}


def _latent(metadata: Metadata) -> dict[str, Any]:
    """Read latent attention, as both generations of files describe it."""
    rotary = metadata.take("rope.dimension_count", int)
    rank = metadata.take("attention.kv_lora_rank", int)
    key = metadata.take("attention.key_length", int)
    value = metadata.take("attention.value_length", int)
    heads = metadata.take("attention.head_count", int)
    if "attention.key_length_mla" in metadata:
        metadata.expect("attention.key_length", rank + rotary)
        metadata.expect("attention.value_length", rank)
        key = metadata.take("attention.key_length_mla", int)
        value = metadata.take("attention.value_length_mla", int)
    metadata.expect("attention.head_count_kv", heads, 1)
    return {
        **_grouped(metadata),
        "num_key_value_heads": heads,
        "q_lora_rank": metadata.take("attention.q_lora_rank", int, 0) or None,
        "kv_lora_rank": rank,
        "qk_rope_head_dim": rotary,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": value,
    }


def deepseek_v2(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of DeepSeek-V2."""
    metadata.expect("expert_gating_func", 1, 0)
    found = _latent(metadata)
    found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    if found["norm_topk_prob"]:
        # The family keeps the entry and does not compute with it.
        metadata.refuse("deepseek2.expert_weights_norm", (False,))
    return found


def deepseek_v3(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of DeepSeek-V3."""
    metadata.expect("expert_gating_func", 2)
    return {**_latent(metadata), "rope_interleave": True, "num_nextn_predict_layers": 0}


def gpt_oss(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of gpt-oss."""
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    metadata.expect("expert_gating_func", 0, 3)
    layers = metadata.take("block_count", int)
    return {
        **_routed(metadata, "num_local_experts"),
        "sliding_window": metadata.take("attention.sliding_window", int),
        "layer_types": [
            "full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)
        ],
        "attention_bias": True,
    }


def minimax_m2(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of MiniMax-M2."""
    metadata.expect("expert_gating_func", 2)
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    metadata.expect("expert_weights_norm", True)
    return _routed(metadata, "num_local_experts")


def phimoe(metadata: Metadata) -> dict[str, Any]:
    """Read the entries of Phi-3.5-MoE."""
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    window = metadata.take("attention.sliding_window", int, 0)
    return {
        **_routed(metadata, "num_local_experts"),
        "sliding_window": window or None,
        "attention_bias": _has(metadata, "attn_output.bias"),
        "lm_head_bias": "output.bias" in metadata.container.blocks,
        # Noise of the training, which GGUF does not keep.
        "router_jitter_noise": 0.01,
        "input_jitter_noise": 0.0,
    }
