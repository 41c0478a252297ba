"""Experts whose two products are each a product of two thinner matrices.

A factored experts module keeps the experts contract and the family's own activation; in the
place of its weights it has

    up_in [E, R, H], up_out [E, 2I, R]          first product: up_out @ up_in
    down_in [E, S, I], down_out [E, H, S]       second product: down_out @ down_in

with the rows of `up_out` in the order of the family (gate before up, or alternating),
whatever way round the family stores its weights. Experts of smaller rank are padded with zeros.
Biases stay. That is how MoE-I² (https://arxiv.org/abs/2411.01016) stores what SVD leaves.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.models.experts import ExpertsLayout
from edgemoe.models.transformers_internals import apply_gate

if TYPE_CHECKING:
    from collections.abc import Sequence

FACTOR_NAMES = ("up_in", "up_out", "down_in", "down_out")
_MARK = "_edgemoe_factored"


def is_factored(experts: nn.Module) -> bool:
    """Return whether an experts module was factored."""
    return hasattr(type(experts), _MARK)


def stack_factors(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the factors of one product of all experts together.

    Args:
        pairs: Of each expert the inner factor [rank, inputs] and the outer one
            [outputs, rank].

    Returns:
        All inner factors [experts, R, inputs] and all outer ones [experts, outputs, R], where R
        is the largest rank; smaller ones are padded with zeros.
    """
    largest = max(inner.shape[0] for inner, _ in pairs)
    pad = nn.functional.pad
    inner_all = [pad(inner, (0, 0, 0, largest - inner.shape[0])) for inner, _ in pairs]
    outer_all = [pad(outer, (0, largest - outer.shape[1])) for _, outer in pairs]
    return torch.stack(inner_all), torch.stack(outer_all)


def run_factored(
    experts: Any, layout: ExpertsLayout, expert: int, hidden: torch.Tensor
) -> torch.Tensor:
    """Run one factored expert, without its gate.

    Args:
        experts: The module.
        layout: How the family stored it before.
        expert: Which.
        hidden: Inputs [tokens, hidden].

    Returns:
        Outputs [tokens, hidden].
    """
    down_bias = experts.down_proj_bias[expert] if layout.has_bias else None
    given = factored_units(experts, layout, expert, hidden)
    return nn.functional.linear(given, experts.down_out[expert], down_bias)


def factored_units(
    experts: Any, layout: ExpertsLayout, expert: int, hidden: torch.Tensor
) -> torch.Tensor:
    """Run one factored expert up to its last factor.

    Args:
        experts: The module.
        layout: How the family stored it before.
        expert: Which.
        hidden: Inputs [tokens, hidden].

    Returns:
        What `down_out` is given [tokens, rank].
    """
    linear = nn.functional.linear
    up_bias = (
        getattr(experts, f"{layout.gate_up_name}_bias")[expert] if layout.has_bias else None
    )
    units = linear(linear(hidden, experts.up_in[expert]), experts.up_out[expert], up_bias)
    activated = apply_gate(experts, units) if layout.has_gate else experts.act_fn(units)
    return linear(activated, experts.down_in[expert])


@cache
def factored_class(family_class: Any) -> type[nn.Module]:
    """Derive the family's class with another forward; its activation is inherited."""

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        layout = ExpertsLayout.of(self)
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.up_in.shape[0]:  # a sentinel: the slot is not used
                continue
            token, slot = torch.where(top_k_index == expert)
            value = run_factored(self, layout, expert, hidden_states[token])
            value = value * top_k_weights[token, slot, None]
            output.index_add_(0, token, value.to(output.dtype))
        return output

    members = {"forward": forward, _MARK: True, "__module__": family_class.__module__}
    return type(f"Factored{family_class.__name__}", (family_class,), members)
