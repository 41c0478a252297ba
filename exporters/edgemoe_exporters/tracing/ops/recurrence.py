"""Layers that keep a state of fixed size: causal convolution and linear attention.

Letters in shapes are those of `tracing.ops`.
"""

from __future__ import annotations

import torch
from torch.nn import functional


@torch.library.custom_op("edgemoe::new_mask", mutates_args=())
def new_mask(attention_mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Return which new tokens are not padding.

    Args:
        attention_mask: int64 `[B, P + S]`.
        states: Of new tokens, float `[B, S, H]`.

    Returns:
        0 or 1 in the type of `states`, `[B, S]`.
    """
    return attention_mask[:, -states.shape[1] :].to(states.dtype)


@new_mask.register_fake
def _(attention_mask: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    return states.new_empty(states.shape[:2])


@torch.library.custom_op("edgemoe::causal_conv", mutates_args=())
def causal_conv(
    states: torch.Tensor,
    past: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Convolve each channel with the positions up to it, those before the new ones included.

    Args:
        states: Of new tokens, float `[B, C, S]`.
        past: The latest positions before them, float `[B, C, W - 1]`; zeros at the start.
        weight: float `[C, W]`.
        bias: float `[C]`, or None.
        activation: Of the output, `none` or `silu`.

    Returns:
        float `[B, C, S]`, and the latest positions now, float `[B, C, W - 1]`.
    """
    joined = torch.cat([past, states], dim=2)
    output = functional.conv1d(joined, weight[:, None], bias, groups=weight.shape[0])
    if activation == "silu":
        output = functional.silu(output)
    return output, joined[:, :, joined.shape[2] - past.shape[2] :].contiguous()


@causal_conv.register_fake
def _(
    states: torch.Tensor,
    past: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return states.new_empty(states.shape), past.new_empty(past.shape)


@torch.library.custom_op("edgemoe::join_positions", mutates_args=())
def join_positions(
    states: torch.Tensor, past: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the latest positions before the new ones, for what looks back a few of them.

    Args:
        states: Of new tokens, float `[B, C, S]`.
        past: The latest positions before them, float `[B, C, W]`; zeros at the start.

    Returns:
        float `[B, C, W + S]`, and the latest positions now, float `[B, C, W]`.
    """
    joined = torch.cat([past.to(states.dtype), states], dim=2)
    return joined, joined[:, :, joined.shape[2] - past.shape[2] :].to(past.dtype).clone()


@join_positions.register_fake
def _(states: torch.Tensor, past: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, channels, new = states.shape
    return states.new_empty(batch, channels, past.shape[2] + new), past.new_empty(past.shape)


@torch.library.custom_op("edgemoe::linear_attention", mutates_args=())
def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    past: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend through a state `[D, V]` of each head, one token after the other.

    The state first decays, `S' = exp(decay) S`, each of its rows by its own decay where there
    are D of them. Then it takes the token in. Without beta, `S = S' + key value^T` (Mamba-2,
    arXiv 2405.21060); with beta by the delta rule, `S = S' + beta key (value - S'^T key)^T`
    (Gated DeltaNet, 2412.06464; Kimi Delta Attention, 2510.26692). The output is
    `scale S^T query`.

    Args:
        query: float `[B, S, M, D]`; M divides N, each serves N / M heads in a row.
        key: float `[B, S, M, D]`; of length 1 for the delta rule.
        value: float `[B, S, N, V]`.
        decay: Logarithms, at most 0, float `[B, S, N, 1]` or `[B, S, N, D]`.
        beta: float `[B, S, N]`, in [0, 1]; None for plain addition.
        past: State after the last token, float32 `[B, N, D, V]`.
        scale: Multiplies the output.

    Returns:
        float `[B, S, N, V]`, and the state, float32 `[B, N, D, V]`; computed in float32.
    """
    state = past.float()
    repeats = value.shape[2] // query.shape[2]
    query, key = (part.repeat_interleave(repeats, dim=2) for part in (query, key))
    outputs = []
    for index in range(query.shape[1]):
        of_token = (part[:, index].float() for part in (query, key, value, decay))
        now, towards, content, fading = of_token
        state = state * fading.exp()[..., None]
        if beta is not None:
            known = (state * towards[..., None]).sum(-2)
            content = (content - known) * beta[:, index].float()[..., None]
        state = state + towards[..., None] * content[..., None, :]
        outputs.append(scale * (state * now[..., None]).sum(-2))
    output = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(value)
    return output.to(value.dtype), state.clone()


@linear_attention.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    past: torch.Tensor,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    return value.new_empty(value.shape), past.new_empty(past.shape)
