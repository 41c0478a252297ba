"""Attention to tokens nearby and to compressed windows of those before: DeepSeek-V4.

Keys are values, one head for all; beside the latest tokens each query sees one entry for every
full window of positions, or those that an indexer chooses. A graph keeps what the windows are
made of, for all positions, and makes the entries anew in each call: they are a small product,
and a cache grows by one slot per position.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch

from edgemoe_exporters.tracing import ops
from edgemoe_exporters.tracing.cache import COMPRESSOR, INDEX_COMPRESSOR, SHARED_KV

if TYPE_CHECKING:
    import contextlib

    from torch import nn

    from edgemoe_exporters.tracing.prepare.attention import Attender

_ATTENTION = "DeepseekV4Attention"


def replace_compressed(
    stack: contextlib.ExitStack, model: nn.Module, attender: Attender
) -> int:
    """Replace attention to compressed windows; layers without stay as they are.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
        attender: Has the cache and the mask of the current pass.

    Returns:
        Positions of the longest window; 0 where there is none.
    """
    longest = 0
    for module in model.modules():
        compressor: Any = getattr(module, "compressor", None)
        if type(module).__name__ == _ATTENTION and compressor is not None:
            module.forward = functools.partial(_attend, attender, module)
            stack.callback(delattr, module, "forward")
            longest = max(longest, int(compressor.compress_rate))
    return longest


def _attend(
    attender: Attender,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: Any,
    position_ids: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    assert attender.cache is not None
    assert attender.attention_mask is not None
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    batch, new = hidden_states.shape[:2]
    cos, sin = position_embeddings[module.rope_layer_type]
    residual = module.q_a_norm(module.q_a_proj(hidden_states))
    query = module.q_b_proj(residual).view(batch, new, -1, module.head_dim).transpose(1, 2)
    query = rotate(module.q_b_norm(query), cos, sin)
    near = module.kv_norm(module.kv_proj(hidden_states))[:, None]
    near = attender.cache.grow(module.layer_idx, SHARED_KV, rotate(near, cos, sin))
    entries, hidden = _compress(attender, module, hidden_states, residual, position_ids)
    # Entries before tokens, so that a token sees the entries and what came before itself.
    total, count = near.shape[2], entries.shape[1]
    row = torch.arange(new, device=near.device) + (total - new)
    column = torch.arange(total, device=near.device)
    far = column[None, :] <= row[:, None] - module.sliding_window
    unseen = torch.cat([hidden, far.expand(batch, new, total)], dim=-1)[:, None]
    selected = torch.zeros_like(unseen, dtype=near.dtype).masked_fill(unseen, float("-inf"))
    mask = attender.attention_mask
    mask = torch.cat([mask.new_ones((batch, count)), mask], dim=1)
    both = torch.cat([entries[:, None], near], dim=2)
    output = ops.attend_all(
        query, both, both, mask, module.sinks, selected, None, module.scaling, 0
    )
    # Values were rotated as keys: turned back at the query's position.
    output = rotate(output.transpose(1, 2), cos, -sin).transpose(1, 2)
    grouped = output.reshape(batch, new, module.config.o_groups, -1)
    return module.o_b_proj(module.o_a_proj(grouped).flatten(2)), None


def _compress(
    attender: Attender,
    module: Any,
    hidden_states: torch.Tensor,
    residual: torch.Tensor,
    position_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return entries `[B, E, D]`, and which a query does not see, bool `[B, S, E]`."""
    compressor, layer = module.compressor, module.layer_idx
    entries = _entries(attender, compressor, hidden_states, layer, COMPRESSOR)
    number = torch.arange(entries.shape[1], device=entries.device)
    full = (position_ids + 1) // compressor.compress_rate
    hidden = number >= full[..., None]
    indexer = getattr(compressor, "indexer", None)
    if indexer is None:
        return entries, hidden
    keys = _entries(attender, indexer, hidden_states, layer, INDEX_COMPRESSOR)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    batch, new = hidden_states.shape[:2]
    angles = indexer.rotary_emb(
        hidden_states, position_ids=position_ids, layer_type=indexer.rope_layer_type
    )
    query = indexer.q_b_proj(residual).view(batch, new, -1, indexer.head_dim)
    query = rotate(query.transpose(1, 2), *angles).transpose(1, 2)
    scores = indexer.scorer(query, keys, hidden_states)
    scores = scores.masked_fill(hidden, float("-inf"))
    # Where there are fewer entries than may be chosen, all are.
    nothing = scores.new_full((batch, new, indexer.index_topk), float("-inf"))
    best = torch.cat([scores, nothing], dim=-1).topk(indexer.index_topk, dim=-1).values
    return entries, hidden | (scores < best[..., -1:])


def _entries(
    attender: Attender, module: Any, hidden_states: torch.Tensor, layer: int, kind: str
) -> torch.Tensor:
    """Return the entries of all full windows so far, `[B, E, D]`."""
    assert attender.cache is not None
    both = torch.cat([module.kv_proj(hidden_states), module.gate_proj(hidden_states)], dim=-1)
    states = attender.cache.grow(layer, kind, both)
    overlaps = both.shape[-1] == 4 * module.head_dim
    pooled = module.kv_norm(ops.pool_windows(states, module.position_bias, overlaps))
    number = torch.arange(pooled.shape[1], device=pooled.device) * module.compress_rate
    positions = number[None].expand(pooled.shape[0], -1)
    cos, sin = module.rotary_emb(
        pooled, position_ids=positions, layer_type=module.rope_layer_type
    )
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    entries: torch.Tensor = rotate(pooled[:, None], cos, sin)[:, 0]
    return entries
