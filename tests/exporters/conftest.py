"""Tiny random models of every family, each traced once for all tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, MixtralConfig, Qwen2MoeConfig

from edgemoe.models.adapter import adapt_model
from edgemoe_exporters.trace import trace

_COMMON = {
    "vocab_size": 199,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 256,
    "initializer_range": 0.1,
}

_CONFIGS = {
    # The first layer dense, the others of different sizes, and all that attention may have.
    "glm4_moe": Glm4MoeConfig(
        **_COMMON,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        head_dim=16,
        moe_intermediate_size=32,
        n_shared_experts=2,
        n_routed_experts=8,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=2.5,
        attention_bias=True,
        use_qk_norm=True,
        partial_rotary_factor=0.5,
        tie_word_embeddings=True,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **_COMMON,
        num_hidden_layers=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=64,
        num_experts=8,
        norm_topk_prob=False,
    ),
    # Experts in groups, weights divided by their sum.
    "grouped": Glm4MoeConfig(
        **_COMMON,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        head_dim=16,
        moe_intermediate_size=32,
        n_shared_experts=1,
        n_routed_experts=12,
        n_group=4,
        topk_group=2,
        norm_topk_prob=True,
        routed_scaling_factor=1.5,
    ),
    "mixtral": MixtralConfig(**_COMMON, num_hidden_layers=2, num_local_experts=6),
}


@dataclass
class Traced:
    """A model and its traced graph."""

    model: Any
    graph: Any


@pytest.fixture(scope="session")
def traced_models() -> Any:
    """Return a function from a family to its traced tiny model."""
    made = {}

    def get(family: Any) -> Any:
        if family not in made:
            made[family] = _trace(family)
        return made[family]

    return get


def _trace(family: Any) -> Any:
    torch.manual_seed(0)
    model = adapt_model(AutoModelForCausalLM.from_config(_CONFIGS[family]).float())
    with torch.no_grad():
        for name, parameter in model.model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    if family == "grouped":
        bias = model.layers[0].correction_bias
        assert bias is not None
        bias.normal_(std=0.1)
    if family == "glm4_moe":
        last: Any = model.layers[-1]
        last.correction_bias.normal_(std=0.1)
        bias = last.correction_bias[:6].clone()
        weights = [last.gate_up, last.down, last.router_weight]
        last.replace_experts(*(tensor[:6].clone() for tensor in weights), bias)
    return Traced(model, trace(model))
