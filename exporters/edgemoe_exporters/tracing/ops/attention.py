"""Attention, rotary embedding and norms as custom ops of a traced model.

Letters in shapes are those of `tracing.ops`.
"""

from __future__ import annotations

import torch

from edgemoe_exporters.tracing.ops.selection import visible_slots


@torch.library.custom_op("edgemoe::attention", mutates_args=())
def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    attention_mask: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend to cached and new positions, causally, with grouped key and value heads.

    Column j of the mask belongs to cache slot j, whatever padding the batch has: a new token
    i of a row attends to the slots `j <= P + i` whose mask is not 0.

    Args:
        query: Rotated queries, float `[B, N, S, D]`.
        key: Rotated keys, float `[B, M, S, D]`; M divides N.
        value: float `[B, M, S, D]`.
        past_key: float `[B, M, P, D]`.
        past_value: float `[B, M, P, D]`.
        attention_mask: int64 `[B, P + S]`, 0 where a slot is padding.
        sinks: Score of an empty slot that every token sees, float `[N]`, or None.
        scale: Multiplies the scores.
        sliding_window: A token sees only this many latest slots; 0 for all.

    Returns:
        float `[B, S, N, D]`, and the keys and the values of past and new tokens, float
        `[B, M, P + S, D]`.
    """
    present_key = torch.cat([past_key, key], dim=2)
    present_value = torch.cat([past_value, value], dim=2)
    output = _attend(
        query, present_key, present_value, attention_mask, sinks, scale, sliding_window
    )
    return output, present_key, present_value


@attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    past_key: torch.Tensor,
    past_value: torch.Tensor,
    attention_mask: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    batch, heads, new, _ = query.shape
    slots = past_key.shape[2] + new
    present_key = key.new_empty((batch, key.shape[1], slots, key.shape[3]))
    present_value = value.new_empty((batch, value.shape[1], slots, value.shape[3]))
    return query.new_empty((batch, new, heads, value.shape[3])), present_key, present_value


@torch.library.custom_op("edgemoe::attend_all", mutates_args=())
def attend_all(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    sinks: torch.Tensor | None,
    selected: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    """Attend as `attention`, where the model itself has joined past and new positions.

    Args:
        query: float `[B, N, S, D]`.
        key: Of all positions, float `[B, M, P + S, D]`.
        value: Of all positions, float `[B, M, P + S, V]`.
        attention_mask: int64 `[B, P + S]`, 0 where a slot is padding.
        sinks: As of `attention`; or one of each token, float `[B, N, S, 1]`.
        selected: Mask added to the scores, of all heads or of each key head, float
            `[B, 1 | M, S, P + S]`; see `tracing.ops.selection`.
        bias: Added to the scores, such as of relative positions, float `[B, N, S, P + S]`.
        scale: Multiplies the scores.
        sliding_window: A token sees only this many latest slots; 0 for all.

    Returns:
        float `[B, S, N, V]`.
    """
    return _attend(
        query, key, value, attention_mask, sinks, scale, sliding_window, selected, bias
    )


@attend_all.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    sinks: torch.Tensor | None,
    selected: torch.Tensor | None,
    bias: torch.Tensor | None,
    scale: float,
    sliding_window: int,
) -> torch.Tensor:
    batch, heads, new, _ = query.shape
    return query.new_empty((batch, new, heads, value.shape[3]))


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    sinks: torch.Tensor | None,
    scale: float,
    sliding_window: int,
    selected: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    total, new = key.shape[2], query.shape[2]
    visible = visible_slots(total, new)
    if sliding_window:
        row = torch.arange(total - new, total)[:, None]
        visible &= torch.arange(total) > row - sliding_window
    allowed = visible & (attention_mask[:, None, None, :] != 0)
    if selected is not None:
        chosen = selected == 0
        allowed = allowed & chosen.repeat_interleave(query.shape[1] // chosen.shape[1], dim=1)
    repeats = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
    # A finite number: a padding row that sees nothing must not become NaN.
    lowest = torch.finfo(query.dtype).min
    scores = query @ key.transpose(2, 3) * scale
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~allowed, lowest)
    if sinks is not None:
        rows = sinks.reshape(1, -1, 1, 1) if sinks.ndim == 1 else sinks
        empty = rows.to(scores.dtype).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, empty], dim=-1)
    weights = scores.softmax(dim=-1)[..., :total]
    return (weights @ value).transpose(1, 2).contiguous()


@torch.library.custom_op("edgemoe::rotary", mutates_args=())
def rotary(
    states: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Rotate the first R numbers of each head by its position; halves, not interleaved.

    Args:
        states: float `[B, N, S, D]`.
        position_ids: int64 `[B, S]`.
        inv_freq: Angles per position, float32 `[R / 2]`, R <= D.
        scaling: Multiplies sine and cosine.

    Returns:
        float `[B, N, S, D]`.
    """
    angles = position_ids[:, None, :, None].float() * inv_freq
    cos = (angles.cos() * scaling).to(states.dtype)
    sin = (angles.sin() * scaling).to(states.dtype)
    half = inv_freq.shape[0]
    first, second = states[..., :half], states[..., half : 2 * half]
    rest = states[..., 2 * half :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return torch.cat(rotated, dim=-1)


@rotary.register_fake
def _(
    states: torch.Tensor, position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float
) -> torch.Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)


@torch.library.custom_op("edgemoe::angles", mutates_args=())
def angles(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute cosines and sines of positions, for models that rotate in another way.

    Args:
        position_ids: int64 `[B, S]`.
        inv_freq: Angles per position, float32 `[R / 2]`.
        scaling: Multiplies both.
        layout: `once`: `[B, S, R / 2]`; `halves`: all angles, then all again; `pairs`:
            each angle twice, both `[B, S, R]`.

    Returns:
        Cosines and sines, float.
    """
    value = position_ids[..., None].float() * inv_freq
    if layout == "halves":
        value = torch.cat([value, value], dim=-1)
    elif layout == "pairs":
        value = value.repeat_interleave(2, dim=-1)
    return value.cos() * scaling, value.sin() * scaling


@angles.register_fake
def _(
    position_ids: torch.Tensor, inv_freq: torch.Tensor, scaling: float, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    width = inv_freq.shape[0] * (1 if layout == "once" else 2)
    shape = (*position_ids.shape, width)
    return inv_freq.new_empty(shape), inv_freq.new_empty(shape)


@torch.library.custom_op("edgemoe::rms_norm", mutates_args=())
def rms_norm(
    states: torch.Tensor, weight: torch.Tensor | None, epsilon: float, offset: float
) -> torch.Tensor:
    """Divide by the root mean square over the last axis, then scale.

    Args:
        states: float `[..., H]`.
        weight: float `[H]`, or None for no scale.
        epsilon: Added to the mean square.
        offset: Added to the weight; some families store the scale minus 1.

    Returns:
        float `[..., H]`; the mean square is taken in float32.
    """
    wide = states.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    unit = wide.to(states.dtype)
    if weight is None:
        return unit.clone()
    return (weight + offset if offset else weight) * unit


@rms_norm.register_fake
def _(
    states: torch.Tensor, weight: torch.Tensor | None, epsilon: float, offset: float
) -> torch.Tensor:
    return torch.empty_like(states, memory_format=torch.contiguous_format)
