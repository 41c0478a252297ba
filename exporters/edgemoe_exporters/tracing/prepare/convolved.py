"""Queries, keys and values that look back a few tokens in ways of their own.

Compressed convolutional attention (ZAYA, https://arxiv.org/abs/2510.04476) mixes queries and
keys of neighbouring tokens by two convolutions, one after the other, and takes half of each
value from the token before. What is cached for that is the input of the first convolution, and
the delayed half of the values. Inkling 2 convolves keys and values with weights that follow
from the token.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch

from edgemoe_exporters.tracing import ops
from edgemoe_exporters.tracing.cache import CONV

if TYPE_CHECKING:
    import contextlib

    from torch import nn

    from edgemoe_exporters.tracing.prepare.attention import Attender

_PROJECTION = "ZayaCCAProjection"
_NORM = "ZayaQKNorm"
_DYNAMIC = "DynamicShortConvolution"
# Of a sum of squares: only a vector of zeros shows that there is one.
_EPSILON = 1e-12


def replace_convolved(
    stack: contextlib.ExitStack, model: nn.Module, attender: Attender
) -> None:
    """Replace convolved projections, the norms of what they give, and convolutions by token.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
        attender: Has the cache of the current pass.
    """
    for module in model.modules():
        name = type(module).__name__
        forward: Any = None
        if name == _PROJECTION:
            forward = functools.partial(_project, attender, module)
        elif name == _NORM:
            forward = functools.partial(_normalise, module)
        elif name.endswith(_DYNAMIC):
            forward = functools.partial(_convolve_by_token, attender, module)
        if forward is not None:
            module.forward = forward
            stack.callback(delattr, module, "forward")


def _project(
    attender: Attender,
    module: Any,
    hidden_states: torch.Tensor,
    cache: Any = None,
    conv_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return queries `[B, S, N, D]`, keys and values `[B, S, M, D]`."""
    del cache
    if conv_mask is not None:
        hidden_states = hidden_states * conv_mask[:, :, None].to(hidden_states.dtype)
    batch, new = hidden_states.shape[:2]
    heads, size = module.num_attention_heads, module.head_dim
    groups, each = module.num_key_value_heads, module.num_key_value_groups
    query, key = module.q_proj(hidden_states), module.k_proj(hidden_states)
    # Queries and keys each keep half of themselves and of each other beside the convolutions.
    own = query.view(batch, new, groups, each, size)
    query_rest = (own + key.view(batch, new, groups, 1, size)) * 0.5
    key_rest = query_rest.mean(dim=3)
    both = torch.cat([query, key], dim=-1).transpose(1, 2)
    joined = _look_back(attender, module.layer_idx, 0, both, module.conv_kernel_size)
    mixed = module.conv_qk_grouped(module.conv_qk_depthwise(joined)).transpose(1, 2)
    width = heads * size
    query = mixed[..., :width].reshape(batch, new, heads, size)
    key = mixed[..., width:].reshape(batch, new, groups, size)
    query = query + query_rest.reshape(batch, new, heads, size)
    delayed = module.v_proj_delayed
    late = torch.nn.functional.linear(hidden_states, delayed.weight).transpose(1, 2)
    # The bias comes after: before the first token there are zeros, of which it is the rest.
    late = _look_back(attender, module.layer_idx, 1, late, 1)[..., :new].transpose(1, 2)
    if delayed.bias is not None:
        late = late + delayed.bias
    value = torch.cat([module.v_proj_current(hidden_states), late], dim=-1)
    return query, key + key_rest, value.view(batch, new, groups, size)


def _convolve_by_token(
    attender: Attender,
    module: Any,
    hidden_states: torch.Tensor,
    dynamic_input: torch.Tensor,
    cache: Any = None,
    conv_mask: torch.Tensor | None = None,
    cache_offset: int = 0,
    **_: Any,
) -> torch.Tensor:
    """Convolve `[B, S, C]` with weights that are the channel's plus the token's for a head."""
    del cache
    batch, new, channels = hidden_states.shape
    taps, heads = module.conv_kernel_size, module.num_heads
    of_token = module.weight_proj(dynamic_input).view(batch, new, heads, 1, taps)
    weights = module.static_weight.T.reshape(heads, -1, taps) + of_token
    seen = hidden_states
    if conv_mask is not None:
        seen = seen * conv_mask[:, :, None].to(seen.dtype)
    layer = module.layer_idx + cache_offset
    joined = _look_back(attender, layer, module.conv_idx, seen.transpose(1, 2), taps - 1)
    mixed = torch.zeros_like(hidden_states).view(batch, new, heads, -1)
    for lag in range(taps):
        first = taps - 1 - lag
        part = joined[:, :, first : first + new].transpose(1, 2)
        mixed = mixed + part.reshape(batch, new, heads, -1) * weights[..., lag]
    output = mixed.reshape(batch, new, channels) + hidden_states
    return output / math.sqrt(2 * taps + 1)


def _look_back(
    attender: Attender, layer: int, number: int, states: torch.Tensor, width: int
) -> torch.Tensor:
    """Return `[B, C, width + S]`: the positions before the new ones, and these."""
    assert attender.cache is not None
    attender.cache.get_conv_state(layer, number)
    empty = states.new_zeros(states.shape[0], states.shape[1], width)
    key, past = attender.cache.take_state(CONV, empty)
    joined, present = ops.join_positions(states, past)
    attender.cache.put_state(key, present)
    output: torch.Tensor = joined
    return output


def _normalise(
    module: Any, query: torch.Tensor, key: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Bring queries and keys to the length sqrt(D), which is RMS norm, and scale the keys."""
    query = ops.rms_norm(query, None, _EPSILON, 0.0)
    key = ops.rms_norm(key, None, _EPSILON, 0.0)
    return query, key * module.temp[None, None, :, None]
