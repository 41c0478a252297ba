"""Windows of positions that become one entry each, as a custom op of a traced model.

Letters in shapes are those of `tracing.ops`.
"""

from __future__ import annotations

import torch


@torch.library.custom_op("edgemoe::pool_windows", mutates_args=())
def pool_windows(states: torch.Tensor, bias: torch.Tensor, overlaps: bool) -> torch.Tensor:
    """Mix the positions of each full window into one entry (DeepSeek-V4, 2026, section 2.3).

    Entry i is the mean of its positions' contents, weighted by a softmax of their gates in each
    channel. Where windows overlap, contents and gates have two halves, and the entry mixes the
    first halves of window i - 1 with the second halves of window i.

    Args:
        states: Contents, then gates, of all positions, float `[B, P + S, 2 C]`.
        bias: Added to the gates of each place in a window of W, float `[W, C]`.
        overlaps: Whether windows overlap; `D = C / 2` then, else `D = C`.

    Returns:
        float `[B, (P + S) // W, D]`; positions after the last full window do not count.
    """
    width, channels = bias.shape
    count = states.shape[1] // width
    whole = states[:, : count * width].float().reshape(len(states), count, width, 2 * channels)
    content, gates = whole[..., :channels], whole[..., channels:] + bias.float()
    if overlaps:
        half = channels // 2
        before = torch.nn.functional.pad(content[..., :half], (0, 0, 0, 0, 1, 0))[:, :count]
        low = float("-inf")
        earlier = torch.nn.functional.pad(gates[..., :half], (0, 0, 0, 0, 1, 0), value=low)
        content = torch.cat([before, content[..., half:]], dim=2)
        gates = torch.cat([earlier[:, :count], gates[..., half:]], dim=2)
    return (content * gates.softmax(dim=2)).sum(dim=2).to(states.dtype)


@pool_windows.register_fake
def _(states: torch.Tensor, bias: torch.Tensor, overlaps: bool) -> torch.Tensor:
    width, channels = bias.shape
    size = channels // 2 if overlaps else channels
    return states.new_empty((states.shape[0], states.shape[1] // width, size))
