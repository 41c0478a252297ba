"""Merge experts: align their neurons, then average them.

An expert computes the same whatever the order of its intermediate neurons, so two experts
may hold alike neurons at different places. UNCURL (https://proceedings.mlr.press/v262/,
pages 165-181, arXiv 2409.01483) aligns each member y to a reference J with the permutation P
that maximises

    <W_in^J, P W_in^y>_F + <W_out^J, W_out^y P^T>_F

which is an assignment problem. With gated experts W_in has two parts, the gate rows and the up
rows, and one permutation moves a neuron's gate row, up row and down column together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

if TYPE_CHECKING:
    from collections.abc import Sequence


def similarity(
    reference_gate_up: torch.Tensor,
    reference_down: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> torch.Tensor:
    """Compare every neuron of one expert with every neuron of another.

    Args:
        reference_gate_up: [2 * intermediate, hidden].
        reference_down: [hidden, intermediate].
        gate_up: [2 * intermediate, hidden].
        down: [hidden, intermediate].

    Returns:
        float64 [intermediate of the reference, intermediate]: sums of the inner products of
        gate rows, up rows and down columns.
    """
    ours = _neurons(reference_gate_up, reference_down)
    return ours @ _neurons(gate_up, down).T


def align(
    reference_gate_up: torch.Tensor,
    reference_down: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Reorder an expert's neurons to be as like a reference's as they can.

    Args:
        reference_gate_up: [2 * intermediate, hidden].
        reference_down: [hidden, intermediate].
        gate_up: [2 * intermediate, hidden].
        down: [hidden, intermediate].

    Returns:
        ``gate_up`` and ``down`` of the same expert, in another order.
    """
    gain = similarity(reference_gate_up, reference_down, gate_up, down)
    _, assigned = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    order = torch.as_tensor(np.asarray(assigned), dtype=torch.int64, device=gate_up.device)
    intermediate = down.shape[-1]
    return gate_up[torch.cat((order, order + intermediate))], down[:, order]


def merge_experts(
    gate_up: torch.Tensor, down: torch.Tensor, shares: Sequence[float], reference: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Average experts after aligning them to one of them.

    Args:
        gate_up: Members [members, 2 * intermediate, hidden].
        down: Members [members, hidden, intermediate].
        shares: Share of each member; they add up to 1.
        reference: Position of the member that the others are aligned to.

    Returns:
        ``gate_up`` [2 * intermediate, hidden] and ``down`` [hidden, intermediate] of the
        merged expert, in the members' type.
    """
    aligned = [
        (gate_up[member], down[member])
        if member == reference
        else align(gate_up[reference], down[reference], gate_up[member], down[member])
        for member in range(len(shares))
    ]
    return (
        average([pair[0] for pair in aligned], shares),
        average([pair[1] for pair in aligned], shares),
    )


def average(tensors: Sequence[torch.Tensor], shares: Sequence[float]) -> torch.Tensor:
    """Average tensors of one shape, summed in float64.

    Args:
        tensors: What to average.
        shares: Share of each; they add up to 1.

    Returns:
        The average, in the type of the first.
    """
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor, share in zip(tensors, shares, strict=True):
        total += share * tensor.double()
    return total.to(tensors[0].dtype)


def _neurons(gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Everything that moves with a neuron, in one row [intermediate, 3 * hidden]."""
    gate, up = gate_up.double().chunk(2)
    return torch.cat((gate, up, down.double().T), dim=1)
