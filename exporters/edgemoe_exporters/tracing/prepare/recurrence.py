"""Convolutions and linear attention in a trace.

transformers calls both through functions of a family's module that other packages' kernels can
replace, under a handful of names and with the arguments of those kernels. Here custom ops
replace them.
"""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from edgemoe.errors import ExportError
from edgemoe_exporters.tracing import ops
from edgemoe_exporters.tracing.cache import CONV, RECURRENT, TraceCache

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from edgemoe_exporters.tracing.prepare.attention import Attender

_ACTIVATIONS = {None: "none", "silu": "silu", "swish": "silu"}
_NORM_EPSILON = 1e-6
_LIGHTNING = "MiniMaxLightningAttention"


def replace_recurrence(
    stack: contextlib.ExitStack, model: torch.nn.Module, attender: Attender
) -> None:
    """Replace a family's convolutions and linear attention by custom ops.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
        attender: Has the cache and the mask of the current pass.
    """
    for modeling in {sys.modules[type(module).__module__] for module in model.modules()}:
        replacements: dict[str, Any] = {
            name: functools.partial(function, attender)
            for name, function in _REPLACEMENTS.items()
        }
        # A cache class that one family requires; its layers are replaced below.
        replacements["MiniMaxCache"] = TraceCache
        for name, replacement in replacements.items():
            if hasattr(modeling, name):
                stack.callback(setattr, modeling, name, getattr(modeling, name))
                setattr(modeling, name, replacement)
    for module in model.modules():
        if type(module).__name__ == _LIGHTNING:
            module.forward = functools.partial(_attend_lightning, attender, module)
            stack.callback(delattr, module, "forward")


def _mask(
    attender: Attender, config: Any, inputs_embeds: torch.Tensor, *_: Any, **__: Any
) -> torch.Tensor:
    del config
    assert attender.attention_mask is not None
    mask: torch.Tensor = ops.new_mask(attender.attention_mask, inputs_embeds)
    return mask


def _convolve(
    attender: Attender,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **_: Any,
) -> torch.Tensor:
    """Replace `causal_conv1d_fn`."""
    if activation not in _ACTIVATIONS:
        raise ExportError(
            f"a causal convolution must be followed by SiLU or nothing, got {activation!r}. "
            "This kind of layer is not supported."
        )
    assert attender.cache is not None
    empty = hidden_states.new_zeros(
        hidden_states.shape[0], hidden_states.shape[1], weight.shape[1] - 1
    )
    state_key, past = attender.cache.take_state(CONV, empty)
    output: torch.Tensor
    output, present = ops.causal_conv(
        hidden_states, past, weight, bias, _ACTIVATIONS[activation]
    )
    attender.cache.put_state(state_key, present)
    return output


def _attend_by_delta_rule(
    attender: Attender,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    *_: Any,
    use_qk_l2norm_in_kernel: bool = False,
    **__: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace `chunk_gated_delta_rule` and `chunk_kda`: `[B, S, heads, size]` each."""
    size = key.shape[-1]
    scale = size**-0.5
    if use_qk_l2norm_in_kernel:
        # x / |x| is RMSNorm(x) / sqrt(size); the query's root goes into the scale.
        epsilon = _NORM_EPSILON / size
        query = ops.rms_norm(query, None, epsilon, 0.0)
        key = ops.rms_norm(key, None, epsilon, 0.0) * size**-0.5
        scale /= size**0.5
    decay = g if g.dim() == query.dim() else g[..., None]
    return _attend(attender, query, key, value, decay, beta, scale)


def _scan_mamba2(
    attender: Attender,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803  the kernel's name for it
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    *_: Any,
    D: torch.Tensor | None = None,  # noqa: N803
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    z: torch.Tensor | None = None,
    return_final_states: bool = False,
    **__: Any,
) -> Any:
    """Replace `mamba_chunk_scan_combined`.

    `hidden_states` are `[B, S, heads, size]`, `dt` `[B, S, heads]`, `B` and `C`
    `[B, S, groups, states]`, `A` and `D` `[heads]`.
    """
    assert z is None
    dt = _step(dt, dt_bias, dt_softplus, dt_limit)
    output, state = _attend(
        attender,
        C,
        B,
        hidden_states * dt[..., None],
        (A * dt)[..., None],
        None,
        1.0,
    )
    if D is not None:
        output = output + D[:, None] * hidden_states
    return (output, state) if return_final_states else output


def _scan_mamba(
    attender: Attender,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,  # noqa: N803  the kernel's name for it
    B: torch.Tensor,  # noqa: N803
    C: torch.Tensor,  # noqa: N803
    D: torch.Tensor | None = None,  # noqa: N803
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Any:
    """Replace `selective_scan_fn`: every channel is a head with values of size 1.

    `hidden_states`, `dt` and `z` are `[B, channels, S]`, `B` and `C`
    `[B, states, S]`, `A` is `[channels, states]`, `D` `[channels]`.
    """
    states, dt = hidden_states.transpose(1, 2), dt.transpose(1, 2)
    dt = _step(dt, delta_bias, delta_softplus)
    output, state = _attend(
        attender,
        C.transpose(1, 2)[:, :, None],
        B.transpose(1, 2)[:, :, None],
        (states * dt)[..., None],
        dt[..., None] * A,
        None,
        1.0,
    )
    output = output[..., 0]
    if D is not None:
        output = output + D * states
    output = output.transpose(1, 2)
    if z is not None:
        output = output * functional.silu(z)
    return (output, state) if return_last_state else output


def _attend_lightning(
    attender: Attender,
    module: Any,
    hidden_states: torch.Tensor,
    *_: Any,
    attention_mask: torch.Tensor | None = None,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    """Replace lightning attention (arXiv 2501.08313), whose heads decay at a fixed rate."""
    assert attender.cache is not None
    batch, new = hidden_states.shape[:2]
    heads, size = module.num_attention_heads, module.head_dim
    states = module.act_fn(module.qkv_proj(hidden_states))
    if attention_mask is not None:
        states = states * attention_mask[:, :, None]
    query, key, value = states.reshape(batch, new, heads, 3 * size).split(size, dim=3)
    decay = -module.slope_rate.reshape(1, 1, heads, 1).expand(batch, new, heads, 1)
    attender.cache.get_recurrent_state(module.layer_idx)
    output = _attend(attender, query, key, value, decay, None, 1.0)[0]
    output = module.norm(output.reshape(batch, new, heads * size))
    output = functional.sigmoid(module.output_gate(hidden_states)) * output
    return module.out_proj(output), None


def _step(
    dt: torch.Tensor,
    bias: torch.Tensor | None,
    softplus: bool,
    limits: tuple[float, float] = (0.0, float("inf")),
) -> torch.Tensor:
    """Return the time step of each token."""
    if bias is not None:
        dt = dt + bias
    if softplus:
        dt = functional.softplus(dt)
    # Softplus is above 0.
    if limits[0] > 0:
        dt = dt.clamp(min=limits[0])
    if limits[1] != float("inf"):
        dt = dt.clamp(max=limits[1])
    return dt


def _attend(
    attender: Attender,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    assert attender.cache is not None
    sizes = query.shape[0], value.shape[2], query.shape[3], value.shape[3]
    state_key, past = attender.cache.take_state(
        RECURRENT, value.new_zeros(sizes, dtype=torch.float32)
    )
    output, state = ops.linear_attention(query, key, value, decay, beta, past, scale)
    attender.cache.put_state(state_key, state)
    return output, state


# Names of the kernels in families' modules.
_REPLACEMENTS: dict[str, Callable[..., Any]] = {
    "create_recurrent_attention_mask": _mask,
    "causal_conv1d_fn": _convolve,
    "torch_chunk_gated_delta_rule": _attend_by_delta_rule,
    "chunk_kimi_delta_attention": _attend_by_delta_rule,
    "mamba2_chunk_scan": _scan_mamba2,
    "mamba_selective_scan": _scan_mamba,
}
