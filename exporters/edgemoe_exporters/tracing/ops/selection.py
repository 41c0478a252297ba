"""Selection of the keys that a token attends to, as custom ops of a traced model.

Letters in shapes are those of `tracing.ops`.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("edgemoe::select_keys", mutates_args=())
def select_keys(scores: torch.Tensor, attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    """Choose keys by the highest scores: DeepSeek Sparse Attention (DeepSeek-V3.2-Exp, 2025).

    Keys that tie with the last one are chosen too.

    Args:
        scores: Of all positions, float `[B, S, P + S]`.
        attention_mask: int64 `[B, P + S]`, 0 where a slot is padding.
        count: Most keys.

    Returns:
        0 where a key is chosen, float `[B, S, P + S]`; a token never chooses later ones.
    """
    visible = visible_slots(scores.shape[2], scores.shape[1]) & (attention_mask[:, None] != 0)
    lowest = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~visible, lowest)
    least = scores.topk(min(count, scores.shape[2]), dim=-1).values[..., -1:]
    return torch.zeros_like(scores).masked_fill((scores < least) | ~visible, lowest)


@select_keys.register_fake
def _(scores: torch.Tensor, attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    return scores.new_empty(scores.shape)


@torch.library.custom_op("edgemoe::select_blocks", mutates_args=())
def select_blocks(
    scores: torch.Tensor,
    attention_mask: torch.Tensor,
    block_size: int,
    count: int,
    local: int,
) -> torch.Tensor:
    """Choose blocks of keys by their highest score: MiniMax-M3's sparse attention.

    Args:
        scores: Of all positions, for each key head, float `[B, M, S, P + S]`.
        attention_mask: int64 `[B, P + S]`, 0 where a slot is padding.
        block_size: Slots of a block; the first begins at slot 0, so padding before a text
            moves its blocks.
        count: Most blocks.
        local: Blocks up to the token's own that are chosen whatever their score.

    Returns:
        0 in the blocks that are chosen, float `[B, M, S, P + S]`.
    """
    total = scores.shape[3]
    visible = visible_slots(total, scores.shape[2]) & (attention_mask[:, None, None] != 0)
    lowest = torch.finfo(scores.dtype).min
    padding = -total % block_size
    hidden = scores.masked_fill(~visible, lowest)
    padded = torch.nn.functional.pad(hidden, (0, padding), value=lowest)
    blocks = padded.reshape(*padded.shape[:3], -1, block_size).amax(-1)
    own = torch.arange(total - scores.shape[2], total)[:, None] // block_size
    behind = own - torch.arange(blocks.shape[3])
    blocks = blocks.masked_fill((behind >= 0) & (behind < local), torch.finfo(scores.dtype).max)
    least = blocks.topk(min(count, blocks.shape[3]), dim=-1).values[..., -1:]
    chosen = (blocks >= least) & (blocks > lowest)
    of_keys = chosen.repeat_interleave(block_size, dim=3)[..., :total]
    return torch.zeros_like(scores).masked_fill(~of_keys, lowest)


@select_blocks.register_fake
def _(
    scores: torch.Tensor,
    attention_mask: torch.Tensor,
    block_size: int,
    count: int,
    local: int,
) -> torch.Tensor:
    return scores.new_empty(scores.shape)


def visible_slots(total: int, new: int) -> torch.Tensor:
    """Return which slots each new token may see.

    Args:
        total: P + S.
        new: S.

    Returns:
        bool `[S, P + S]`.
    """
    return torch.arange(total) <= torch.arange(total - new, total)[:, None]
