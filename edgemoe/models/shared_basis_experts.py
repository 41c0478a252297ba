"""Experts that work in a smaller space, which all experts of a layer share.

With an input basis P [R, H] and an output basis Q [H, R], R <= H, a layer gives

    y = Q experts(P x)

where the experts are the family's own with a hidden size of R: `gate_up_proj` [E, 2I, R] and
`down_proj` [E, R, I], or as the family stores them. The router and shared experts see all of
x. Both bases are stored once per layer, and whatever runs a family's experts, fused kernels
included, runs these unchanged; only a factored layer needs products of its own
(`edgemoe.models.factored_experts`), and no layer is both.

A bias of the first product stays as it is. A bias of the second is part of an expert's output
and goes through the output basis with the rest of it: the module holds its R coordinates
[E, R]. Which bases to choose: `edgemoe.decompose.shared_basis`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch

INPUT_BASIS = "input_basis"
OUTPUT_BASIS = "output_basis"
_MARK = "_edgemoe_based"


def is_based(experts: nn.Module) -> bool:
    """Return whether the experts of a module share bases."""
    return hasattr(type(experts), _MARK)


@cache
def based_class(family_class: Any) -> type[nn.Module]:
    """Derive the family's class; between the bases its own implementation runs."""

    def forward(
        self: Any, hidden_states: torch.Tensor, *arguments: Any, **options: Any
    ) -> torch.Tensor:
        reduced = nn.functional.linear(hidden_states, self.input_basis)
        output = family_class.forward(self, reduced, *arguments, **options)
        return nn.functional.linear(output, self.output_basis)

    members = {"forward": forward, _MARK: True, "__module__": family_class.__module__}
    return type(f"Based{family_class.__name__}", (family_class,), members)
