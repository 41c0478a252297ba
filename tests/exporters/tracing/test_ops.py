"""The traced ops against transformers' own modules."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig
from transformers.models.glm4_moe import modeling_glm4_moe as glm

from edgemoe_exporters.tracing import ops

CONFIG = Glm4MoeConfig(
    hidden_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    moe_intermediate_size=24,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    partial_rotary_factor=0.5,
    max_position_embeddings=64,
    attn_implementation="eager",
)

SIGMOID = ("sigmoid", "all", True, 1e-20, 1.5, "scores")
SILU = (False, True, "swish", True, 1.0, 0.0, math.inf, math.inf, math.inf)


def test_norm_is_the_models() -> None:
    norm = glm.Glm4MoeRMSNorm(32, eps=1e-5)
    torch.nn.init.normal_(norm.weight)
    states = torch.randn(2, 3, 32)
    torch.testing.assert_close(ops.rms_norm(states, norm.weight, 1e-5, 0.0), norm(states))


def test_rotation_is_the_models_for_part_of_a_head() -> None:
    embedding = glm.Glm4MoeRotaryEmbedding(CONFIG)
    query, key = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 5, 16)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 2, 9, 30, 1]])
    expected = glm.apply_rotary_pos_emb(query, key, *embedding(query, positions))
    for states, rotated in zip((query, key), expected, strict=True):
        actual = ops.rotary(states, positions, embedding.inv_freq, 1.0)
        torch.testing.assert_close(actual, rotated)


def test_routing_and_experts_are_the_models() -> None:
    torch.manual_seed(0)
    block = glm.Glm4MoeMoE(CONFIG)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block.gate.e_score_correction_bias.normal_(std=0.1)
    hidden = torch.randn(7, 32)
    _, weights, indices = block.gate(hidden)
    expected = block.experts(hidden, indices, weights)
    caps = torch.tensor([1, 99])
    arguments = (3, *SIGMOID, 4, 2, "top2", -math.inf, 0.0, 0, 0)
    gate = block.gate
    tensors = (hidden, gate.weight, None, gate.e_score_correction_bias, None, None, caps)
    weights, indices = ops.route(*tensors, 1, *arguments)
    moe = block.experts
    parts = (moe.gate_up_proj, moe.down_proj, None, None, *SILU)
    actual = ops.experts(hidden, indices, weights, *parts)
    torch.testing.assert_close(actual, expected)

    weights, indices = ops.route(*tensors, 0, *arguments)
    assert (indices[:, 1:] == 8).all()
    assert (weights[:, 1:] == 0).all()
    assert (indices[:, 0] < 8).all()
    capped = ops.experts(hidden, indices, weights, *parts)
    alone = moe(hidden, indices[:, :1], weights[:, :1])
    torch.testing.assert_close(capped, alone)


@pytest.mark.parametrize("window", [0, 3])
def test_attention_is_the_models_whatever_the_padding(window: Any) -> None:
    torch.manual_seed(1)
    module = glm.Glm4MoeAttention(CONFIG, 0)
    query = torch.randn(2, 4, 3, 16)
    key, value = torch.randn(2, 2, 7, 16), torch.randn(2, 2, 7, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 0, 1, 1]])
    row, column = torch.arange(4, 7)[:, None], torch.arange(7)
    visible = (column <= row) & (mask[:, None, None] != 0)
    if window:
        visible &= column > row - window
    bias = torch.where(visible, 0.0, torch.finfo(torch.float32).min)
    expected, _ = glm.eager_attention_forward(module, query, key, value, bias, 0.3)
    past = key[:, :, :4], value[:, :, :4]
    actual, keys, values = ops.attention(
        query, key[:, :, 4:], value[:, :, 4:], *past, mask, None, 0.3, window
    )
    whole = ops.attend_all(query, key, value, mask, None, None, None, 0.3, window)
    torch.testing.assert_close(whole, expected)
    torch.testing.assert_close(actual, expected)
    assert torch.equal(keys, key)
    assert torch.equal(values, value)


def test_ops_keep_torchs_contract() -> None:
    states = torch.randn(2, 2, 3, 16)
    caps, ids = torch.tensor([2]), torch.tensor([[0, 1]])
    hidden, weight = torch.randn(5, 8), torch.randn(4, 8)
    mask = torch.ones(2, 5, dtype=torch.int64)
    past = torch.randn(2, 2, 2, 16)
    calls = {
        "rms_norm": (hidden, torch.randn(8), 1e-5, 1.0),
        "angles": (ids, torch.randn(4), 1.5, "pairs"),
        "rotary": (states[:1, :, :2], ids, torch.randn(4), 1.0),
        "route": (
            *(hidden, weight, torch.randn(4), None, torch.randn(4), None, caps, 0, 2),
            *("softmax", "all", True, 0.0, 1.0, "scores", 1, 1, "max", 0.0, 0.0, 1, 0),
        ),
        "shared_gates": (hidden, torch.randn(6, 8), torch.rand(5, 2), 2, 3.0),
        "experts": (
            hidden,
            torch.randint(0, 5, (5, 2)),
            torch.rand(5, 2),
            torch.randn(4, 8, 12),
            torch.randn(4, 6, 8),
            torch.randn(4, 12),
            torch.randn(4, 8),
            *(True, False, "swish", True, 1.702, 1.0, 7.0, math.inf, math.inf),
        ),
        "attention": (states, states, states, past, past, mask, torch.randn(2), 0.25, 0),
        "attend_all": (states, past, past, mask[:, :2], None, None, None, 0.25, 2),
        "select_keys": (torch.randn(2, 3, 5), mask, 2),
        "select_blocks": (torch.randn(2, 2, 3, 5), mask, 2, 1, 1),
        "new_mask": (mask, torch.randn(2, 3, 8)),
        "causal_conv": (
            *(torch.randn(2, 6, 3), torch.randn(2, 6, 3), torch.randn(6, 4)),
            *(torch.randn(6), "silu"),
        ),
        "pool_windows": (torch.randn(2, 11, 16), torch.randn(3, 8), True),
        "join_positions": (torch.randn(2, 6, 3), torch.randn(2, 6, 2)),
        "linear_attention": (
            *(torch.randn(2, 3, 2, 8), torch.randn(2, 3, 2, 8), torch.randn(2, 3, 4, 5)),
            *(-torch.rand(2, 3, 4, 1), torch.rand(2, 3, 4), torch.zeros(2, 4, 8, 5), 0.5),
        ),
    }
    for name, arguments in calls.items():
        operator = getattr(torch.ops.edgemoe, name).default
        torch.library.opcheck(
            operator, arguments, test_utils=("test_schema", "test_faketensor")
        )
