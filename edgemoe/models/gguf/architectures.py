"""llama.cpp's architectures in transformers' words: configuration and names of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.models.gguf import rules
from edgemoe.models.gguf.rules import Rule, both, choice_bias, each_expert, shared_expert

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgemoe.models.gguf.metadata import Metadata


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How a file of one architecture becomes a checkpoint of one family.

    Attributes:
        model_type: The family, as config.json names it.
        rules: How tensors of a decoder layer are made.
        read: Reads the entries of config.json that are the family's own.
        head_dim: Entry for the size of a head; None where the family has none.
        rotary: How many dimensions of a head may be turned: `all`, or `some` where the family
            has a fraction of them.
    """

    model_type: str
    rules: tuple[Rule, ...]
    read: Callable[[Metadata], dict[str, Any]] = lambda metadata: {}
    head_dim: str | None = "head_dim"
    rotary: str = "all"


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


def _dense(metadata: Metadata) -> dict[str, Any]:
    return {
        "attention_bias": _has(metadata, "attn_output.bias"),
        "mlp_bias": _has(metadata, "ffn_down.bias"),
    }


def _mixtral(metadata: Metadata) -> dict[str, Any]:
    width = metadata.take("feed_forward_length", int)
    metadata.expect("expert_feed_forward_length", width)
    # llama.cpp divides by the sum of the chosen weights in any case, and so does the family.
    metadata.expect("expert_weights_norm", True, False)
    return _routed(metadata, "num_local_experts")


def _qwen2_moe(metadata: Metadata) -> dict[str, Any]:
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


def _qwen3(metadata: Metadata) -> dict[str, Any]:
    return {"attention_bias": _has(metadata, "attn_output.bias"), "use_sliding_window": False}


def _qwen3_moe(metadata: Metadata) -> dict[str, Any]:
    return {
        **_routed(metadata),
        **_qwen3(metadata),
        "moe_intermediate_size": _expert_width(metadata),
        "norm_topk_prob": metadata.take("expert_weights_norm", bool, True),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }


def _olmoe(metadata: Metadata) -> dict[str, Any]:
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    return {
        **_routed(metadata),
        "norm_topk_prob": metadata.take("expert_weights_norm", bool, False),
        "clip_qkv": metadata.take("attention.clamp_kqv", float, 0.0) or None,
        "attention_bias": _has(metadata, "attn_output.bias"),
    }


def _granite(metadata: Metadata) -> dict[str, Any]:
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


def _glm4_moe(metadata: Metadata) -> dict[str, Any]:
    metadata.expect("expert_gating_func", 2, 0)
    return {
        **_grouped(metadata),
        "use_qk_norm": _has(metadata, "attn_q_norm.weight"),
        "attention_bias": _has(metadata, "attn_q.bias"),
        "num_nextn_predict_layers": 0,
    }


def _dots1(metadata: Metadata) -> dict[str, Any]:
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


def _deepseek_v2(metadata: Metadata) -> dict[str, Any]:
    metadata.expect("expert_gating_func", 1, 0)
    found = _latent(metadata)
    found["topk_method"] = "group_limited_greedy" if found["n_group"] > 1 else "greedy"
    if found["norm_topk_prob"]:
        # The family keeps the entry and does not compute with it.
        metadata.refuse("deepseek2.expert_weights_norm", (False,))
    return found


def _deepseek_v3(metadata: Metadata) -> dict[str, Any]:
    metadata.expect("expert_gating_func", 2)
    return {**_latent(metadata), "rope_interleave": True, "num_nextn_predict_layers": 0}


def _gpt_oss(metadata: Metadata) -> dict[str, Any]:
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


def _minimax_m2(metadata: Metadata) -> dict[str, Any]:
    metadata.expect("expert_gating_func", 2)
    metadata.expect("expert_feed_forward_length", metadata.take("feed_forward_length", int))
    metadata.expect("expert_weights_norm", True)
    return _routed(metadata, "num_local_experts")


def _phimoe(metadata: Metadata) -> dict[str, Any]:
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


_PLAIN, _PAIRED = rules.attention(paired=False), rules.attention(paired=True)
_GATED = ("gate_proj", "up_proj", "down_proj")
_GATE = both("mlp.gate", "ffn_gate_inp")
_MIXTRAL = (
    *rules.AFTER_ATTENTION,
    *both("block_sparse_moe.gate", "ffn_gate_inp"),
    *each_expert("block_sparse_moe.experts", "w1", "w3", "w2"),
)
_QWEN = (*_PLAIN, *rules.AFTER_ATTENTION, *_GATE, *each_expert("mlp.experts", *_GATED))
_GRANITE = (
    *_PAIRED,
    *rules.AFTER_ATTENTION,
    Rule(target="block_sparse_moe.router.layer.weight", sources=("ffn_gate_inp.weight",)),
    Rule(
        target="block_sparse_moe.input_linear.weight",
        sources=("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        build=rules.joined,
    ),
    Rule(target="block_sparse_moe.input_linear.weight", sources=("ffn_gate_up_exps.weight",)),
    Rule(target="block_sparse_moe.output_linear.weight", sources=("ffn_down_exps.weight",)),
)
_GROUPED = (
    *rules.DENSE,
    *_GATE,
    *each_expert("mlp.experts", *_GATED),
    *shared_expert("mlp.shared_experts"),
    choice_bias("mlp.gate.e_score_correction_bias"),
)
_LATENT = (
    *both("input_layernorm", "attn_norm"),
    *rules.AFTER_ATTENTION,
    *both("self_attn.q_proj", "attn_q"),
    *both("self_attn.q_a_proj", "attn_q_a"),
    *both("self_attn.q_a_layernorm", "attn_q_a_norm"),
    *both("self_attn.q_b_proj", "attn_q_b"),
    *both("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    *both("self_attn.kv_a_layernorm", "attn_kv_a_norm"),
    *both("self_attn.kv_b_proj", "attn_kv_b"),
    Rule(
        target="self_attn.kv_b_proj.weight",
        sources=("attn_k_b.weight", "attn_v_b.weight"),
        build=rules.latent,
    ),
    *both("self_attn.o_proj", "attn_output"),
    *_GROUPED,
)
_GPT_OSS = (
    *_PLAIN,
    *both("post_attention_layernorm", "post_attention_norm"),
    Rule(target="self_attn.sinks", sources=("attn_sinks.weight",)),
    *both("mlp.router", "ffn_gate_inp"),
    Rule(
        target="mlp.experts.gate_up_proj",
        sources=("ffn_gate_exps.weight", "ffn_up_exps.weight"),
        build=rules.alternating,
    ),
    Rule(
        target="mlp.experts.gate_up_proj_bias",
        sources=("ffn_gate_exps.bias", "ffn_up_exps.bias"),
        build=rules.alternating_bias,
    ),
    Rule(target="mlp.experts.down_proj", sources=("ffn_down_exps.weight",), build=rules.turned),
    Rule(target="mlp.experts.down_proj_bias", sources=("ffn_down_exps.bias",)),
)

_KNOWN: dict[str, Architecture] = {
    "llama": Architecture(
        model_type="llama", rules=(*_PAIRED, *rules.AFTER_ATTENTION, *rules.DENSE), read=_dense
    ),
    "llama with experts": Architecture(
        model_type="mixtral", rules=(*_PAIRED, *_MIXTRAL), read=_mixtral
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        rules=(*_PLAIN, *rules.AFTER_ATTENTION, *rules.DENSE),
        read=lambda metadata: {"use_sliding_window": False},
        head_dim=None,
    ),
    "qwen3": Architecture(
        model_type="qwen3", rules=(*_PLAIN, *rules.AFTER_ATTENTION, *rules.DENSE), read=_qwen3
    ),
    "qwen2moe": Architecture(
        model_type="qwen2_moe",
        rules=(
            *_QWEN,
            *shared_expert("mlp.shared_expert"),
            Rule(
                target="mlp.shared_expert_gate.weight",
                sources=("ffn_gate_inp_shexp.weight",),
                build=rules.as_row,
            ),
        ),
        read=_qwen2_moe,
        head_dim=None,
    ),
    "qwen3moe": Architecture(model_type="qwen3_moe", rules=_QWEN, read=_qwen3_moe),
    "olmoe": Architecture(model_type="olmoe", rules=_QWEN, read=_olmoe, head_dim=None),
    "granitemoe": Architecture(
        model_type="granitemoe", rules=_GRANITE, read=_granite, head_dim=None
    ),
    "granitemoe with shared experts": Architecture(
        model_type="granitemoeshared",
        rules=(
            *_GRANITE,
            Rule(
                target="shared_mlp.input_linear.weight",
                sources=("ffn_gate_shexp.weight", "ffn_up_shexp.weight"),
                build=rules.joined,
            ),
            Rule(target="shared_mlp.output_linear.weight", sources=("ffn_down_shexp.weight",)),
        ),
        read=_granite,
        head_dim=None,
    ),
    "deepseek2": Architecture(
        model_type="deepseek_v2", rules=_LATENT, read=_deepseek_v2, head_dim=None
    ),
    "deepseek2 with sigmoid": Architecture(
        model_type="deepseek_v3", rules=_LATENT, read=_deepseek_v3, head_dim=None
    ),
    "glm4moe": Architecture(
        model_type="glm4_moe",
        rules=(
            *_PLAIN,
            *both("post_attention_layernorm", "post_attention_norm"),
            *_GROUPED,
        ),
        read=_glm4_moe,
        rotary="some",
    ),
    "dots1": Architecture(
        model_type="dots1", rules=(*_PLAIN, *rules.AFTER_ATTENTION, *_GROUPED), read=_dots1
    ),
    "gpt-oss": Architecture(model_type="gpt_oss", rules=_GPT_OSS, read=_gpt_oss),
    "minimax-m2": Architecture(
        model_type="minimax_m2",
        rules=(
            *_PLAIN,
            *_MIXTRAL,
            choice_bias("block_sparse_moe.e_score_correction_bias"),
        ),
        read=_minimax_m2,
        rotary="some",
    ),
    "phimoe": Architecture(
        model_type="phimoe", rules=(*_PLAIN, *_MIXTRAL), read=_phimoe, head_dim=None
    ),
}
NAMES = tuple(sorted({name.partition(" ")[0] for name in _KNOWN}))
"""Architectures that are read, as `general.architecture` names them."""


def find_architecture(metadata: Metadata) -> Architecture | None:
    """Find how a file is read.

    Args:
        metadata: Its keys.

    Returns:
        The architecture; None where it is not supported.
    """
    name = metadata.container.architecture
    if name == "llama" and metadata.take("expert_count", int, 0):
        name = "llama with experts"
    elif name == "granitemoe" and metadata.take("expert_shared_feed_forward_length", int, 0):
        name = "granitemoe with shared experts"
    elif name == "deepseek2" and metadata.take("expert_gating_func", int, 1) == 2:
        name = "deepseek2 with sigmoid"
    return _KNOWN.get(name)
