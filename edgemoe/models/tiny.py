"""A tiny random model of any family, to try a family without its gigabytes.

Sizes are set by the entries that a family's configuration has; families that want more than
one of a kind (layers with state, hashed routers, groups) get it from `_SPECIAL`.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edgemoe.models.loading import quiet_transformers
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

VOCAB_SIZE = 96

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "dense_intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "shared_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "model_max_length": 256,
    "sliding_window": 8,
    "sliding_window_size": 8,
    # Experts.
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "num_expert_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    # Latent attention.
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 24,
    # With few heads all of them often score 0, and the highest scores are no clear choice.
    "index_n_heads": 32,
    # Layers with state.
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    # Special tokens, and a spread that makes routing differ between tokens.
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "initializer_range": 0.2,
}

_ALL_HEADS = {"num_key_value_heads": 4}
_MIXED = ["linear_attention", "full_attention"] * 2
_SWA_HEADS = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16}
_SPECIAL: dict[str, dict[str, Any]] = {
    "axk1": _ALL_HEADS,
    "axk2": {**_ALL_HEADS, "gated_norm_rank": 8},
    "bailing_hybrid": {
        **_ALL_HEADS,
        "layer_types": _MIXED,
        "layer_group_size": 2,
        "num_expert_group": 2,
        "num_nextn_predict_layers": 0,
    },
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"], "n_group": 2},
    "deepseek_v2": _ALL_HEADS,
    "deepseek_v3": {**_ALL_HEADS, "n_routed_experts": 16, "n_group": 4, "topk_group": 2},
    "deepseek_v32": _ALL_HEADS,
    "deepseek_v4": {
        "o_groups": 2,
        "o_lora_rank": 16,
        "num_key_value_heads": 1,
        "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
        "layer_types": [
            "sliding_attention",
            "heavily_compressed_attention",
            "compressed_sparse_attention",
            "heavily_compressed_attention",
        ],
        "compress_rates": {
            "compressed_sparse_attention": 2,
            "heavily_compressed_attention": 4,
        },
        "index_n_heads": 16,
        "index_topk": 4,
    },
    # Of other sizes than the layers that see everything, and by default 40 times as wide.
    "dots3_note_text": {
        **_ALL_HEADS,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 12,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCAB_SIZE,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
    },
    "glm4_moe_lite": _ALL_HEADS,
    "glm_moe_dsa": _ALL_HEADS,
    "granitemoehybrid": {
        "layer_types": _MIXED,
        "mamba_n_heads": 4,
        "mamba_d_head": 32,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "hy_v4": _ALL_HEADS,
    "hy_v4_vl_text": {
        **_ALL_HEADS,
        "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    },
    # The second and third layer run twice.
    "inkling2_loop_text": {
        **_SWA_HEADS,
        "d_rel": 4,
        "rel_extent": 16,
        "unpadded_vocab_size": VOCAB_SIZE,
        "layer_types": ["hybrid_sliding", "hybrid"] * 2,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
        "loop_num_passes": 2,
        "loop_gate_rank": 8,
    },
    "inkling2_text": {
        **_SWA_HEADS,
        "d_rel": 4,
        "rel_extent": 16,
        "unpadded_vocab_size": VOCAB_SIZE,
    },
    "inkling_text": {**_SWA_HEADS, "d_rel": 4, "rel_extent": 16},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {**_ALL_HEADS, "layer_types": _MIXED},
    "laguna": {"num_attention_heads_per_layer": [4] * 4},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_dense_layers": 1,
    },
    "minimax": {"layer_types": _MIXED, "block_size": 8},
    "minimax_m3_vl_text": {
        "rotary_dim": 8,
        "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "layer_types": ["full_attention", "minimax_m3_sparse"] * 2,
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mistral4": {
        **_ALL_HEADS,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 2.0,
            "original_max_position_embeddings": 128,
            "llama_4_scaling_beta": 0.1,
            "partial_rotary_factor": 0.5,
        },
        "head_dim": 32,
    },
    "nemotron_h": {
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 16,
        "n_groups": 2,
        "chunk_size": 8,
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"],
    },
    "qwen3_5_moe_text": {"layer_types": _MIXED},
    "qwen3_next": {"layer_types": _MIXED},
    "qwen4_exp_text": {
        "layer_types": _MIXED,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
        "hc_lowrank": 16,
        "ple_embed_dim": 32,
        "ngram_vocab_size_base": 200,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """Make the configuration of a tiny model: 4 layers, 8 experts, hidden size 64.

    Args:
        model_type: A family, as in config.json.
        **changes: Entries to set besides.

    Returns:
        The configuration.

    Raises:
        FamilyError: There is no such family with experts.
    """
    configuration: Any = find_family(model_type).configuration
    known = {*configuration().to_dict(), *inspect.signature(configuration.__init__).parameters}
    aliases: dict[str, str] = dict(configuration.attribute_map or {})
    sizes = {name: size for name, size in _SIZES.items() if name in known - set(aliases)}
    # Of an entry that is given by two names, transformers takes either.
    given = {aliases.get(name, name): value for name, value in changes.items()}
    special = dict(_SPECIAL.get(model_type, {}))
    for name in special:
        if "vocab_size" in name and special[name] == VOCAB_SIZE:
            # Tables beside the embedding have a row for every token too.
            special[name] = given.get("vocab_size", VOCAB_SIZE)
    made: PreTrainedConfig = configuration(**{**sizes, **special, **given})
    return made


def tiny_model(config: PreTrainedConfig, *, seed: int = 0) -> PreTrainedModel:
    """Make a model with random weights, none of which is at a special value such as 0 or 1.

    Args:
        config: From `tiny_config`.
        seed: Of the random weights.

    Returns:
        The model, in eval mode, in float32.
    """
    torch.manual_seed(seed)
    model: Any = find_family(config.model_type).causal_lm(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.std(correction=0) == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                persistent = name not in module._non_persistent_buffers_set
                if persistent and buffer.is_floating_point() and buffer.numel() > 1:
                    # Others are what the family has computed, such as rates of decay.
                    if buffer.std(correction=0) == 0:
                        buffer.add_(0.1 * torch.randn_like(buffer))
                elif persistent and buffer.ndim == 2:
                    # The experts of each token, without repetition.
                    order = torch.rand(len(buffer), config.num_local_experts).argsort(dim=1)
                    buffer.copy_(order[:, : buffer.shape[1]])
    made: PreTrainedModel = model
    return made


def write_tiny_checkpoint(
    model_type: str,
    path: Path,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Path:
    """Write a tiny random checkpoint with a tokenizer that knows `w0` to `w95`.

    Args:
        model_type: A family, as in config.json.
        path: The directory to write.
        seed: Of the random weights.
        dtype: Floating type to store.
        **changes: Configuration entries to set besides.

    Returns:
        `path`.

    Raises:
        FamilyError: There is no such family with experts.
    """
    model = tiny_model(tiny_config(model_type, **changes), seed=seed)
    with quiet_transformers():
        model.to(dtype).save_pretrained(path)
    words = {f"w{index}": index for index in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path
