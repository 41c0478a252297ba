"""Factored experts as a custom op of a traced model.

Letters in shapes are those of `tracing.ops`; R and S are the ranks of
the two products.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from edgemoe.models.activation import Activation
from edgemoe.models.experts import ExpertsLayout


@torch.library.custom_op("edgemoe::factored_experts", mutates_args=())
def factored_experts(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_in: torch.Tensor,
    up_out: torch.Tensor,
    down_in: torch.Tensor,
    down_out: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    is_concatenated: bool,
    activation: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    gate_softcap: float,
    up_softcap: float,
) -> torch.Tensor:
    """Sum the chosen experts' outputs, each times its weight.

    Args:
        hidden: float `[T, H]`.
        indices: Expert ids, int64 `[T, k]`; an id equal to E is skipped.
        weights: float `[T, k]`.
        up_in: float `[E, R, H]`.
        up_out: float `[E, 2I, R]`.
        down_in: float `[E, S, I]`.
        down_out: float `[E, H, S]`.
        up_bias: float `[E, 2I]`, or None.
        down_bias: float `[E, H]`, or None.
        is_concatenated: Whether gate rows come before up rows, or alternate with them.
        activation: This and the following are those of
            `edgemoe.models.activation.Activation`.
        gated: Whether there is a gate.
        alpha: Slope inside `swish`.
        beta: Added to the up half.
        limit: Where both halves are cut off.
        gate_softcap: Bound of the gate as a factor.
        up_softcap: Bound of the up half.

    Returns:
        float `[T, H]`.
    """
    layout = ExpertsLayout(has_gate=gated, is_concatenated=is_concatenated)
    act = Activation(
        kind=activation,
        gated=gated,
        alpha=alpha,
        beta=beta,
        limit=limit,
        gate_softcap=gate_softcap,
        up_softcap=up_softcap,
    )
    output = torch.zeros_like(hidden)
    for expert in range(up_in.shape[0]):
        token, slot = torch.where(indices == expert)
        units = functional.linear(hidden[token], up_in[expert])
        bias = None if up_bias is None else up_bias[expert]
        units = functional.linear(units, up_out[expert], bias)
        # One row per unit, as the layout reorders them.
        units = layout.to_canonical(layout.gate_up_name, units.T).T
        value = act(*units.chunk(2, dim=-1)) if gated else act(units)
        bias = None if down_bias is None else down_bias[expert]
        value = functional.linear(
            functional.linear(value, down_in[expert]), down_out[expert], bias
        )
        output.index_add_(0, token, value * weights[token, slot, None])
    return output


@factored_experts.register_fake
def _(
    hidden: torch.Tensor,
    indices: torch.Tensor,
    weights: torch.Tensor,
    up_in: torch.Tensor,
    up_out: torch.Tensor,
    down_in: torch.Tensor,
    down_out: torch.Tensor,
    up_bias: torch.Tensor | None,
    down_bias: torch.Tensor | None,
    is_concatenated: bool,
    activation: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float,
    gate_softcap: float,
    up_softcap: float,
) -> torch.Tensor:
    return torch.empty_like(hidden)
