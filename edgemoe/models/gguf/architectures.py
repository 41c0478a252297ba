"""llama.cpp's architectures in transformers' words: configuration and names of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.models.gguf import entries, rules
from edgemoe.models.gguf.rules import Rule, both, choice_bias, each_expert, shared_expert

if TYPE_CHECKING:
    from collections.abc import Callable

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
        model_type="llama",
        rules=(*_PAIRED, *rules.AFTER_ATTENTION, *rules.DENSE),
        read=entries.dense,
    ),
    "llama with experts": Architecture(
        model_type="mixtral", rules=(*_PAIRED, *_MIXTRAL), read=entries.mixtral
    ),
    "qwen2": Architecture(
        model_type="qwen2",
        rules=(*_PLAIN, *rules.AFTER_ATTENTION, *rules.DENSE),
        read=lambda metadata: {"use_sliding_window": False},
        head_dim=None,
    ),
    "qwen3": Architecture(
        model_type="qwen3",
        rules=(*_PLAIN, *rules.AFTER_ATTENTION, *rules.DENSE),
        read=entries.qwen3,
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
        read=entries.qwen2_moe,
        head_dim=None,
    ),
    "qwen3moe": Architecture(model_type="qwen3_moe", rules=_QWEN, read=entries.qwen3_moe),
    "olmoe": Architecture(model_type="olmoe", rules=_QWEN, read=entries.olmoe, head_dim=None),
    "granitemoe": Architecture(
        model_type="granitemoe", rules=_GRANITE, read=entries.granite, head_dim=None
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
        read=entries.granite,
        head_dim=None,
    ),
    "deepseek2": Architecture(
        model_type="deepseek_v2", rules=_LATENT, read=entries.deepseek_v2, head_dim=None
    ),
    "deepseek2 with sigmoid": Architecture(
        model_type="deepseek_v3", rules=_LATENT, read=entries.deepseek_v3, head_dim=None
    ),
    "glm4moe": Architecture(
        model_type="glm4_moe",
        rules=(
            *_PLAIN,
            *both("post_attention_layernorm", "post_attention_norm"),
            *_GROUPED,
        ),
        read=entries.glm4_moe,
        rotary="some",
    ),
    "dots1": Architecture(
        model_type="dots1",
        rules=(*_PLAIN, *rules.AFTER_ATTENTION, *_GROUPED),
        read=entries.dots1,
    ),
    "gpt-oss": Architecture(model_type="gpt_oss", rules=_GPT_OSS, read=entries.gpt_oss),
    "minimax-m2": Architecture(
        model_type="minimax_m2",
        rules=(
            *_PLAIN,
            *_MIXTRAL,
            choice_bias("block_sparse_moe.e_score_correction_bias"),
        ),
        read=entries.minimax_m2,
        rotary="some",
    ),
    "phimoe": Architecture(
        model_type="phimoe", rules=(*_PLAIN, *_MIXTRAL), read=entries.phimoe, head_dim=None
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
