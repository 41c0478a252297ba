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
    from collections.abc import Mapping, Sequence


def similarity(
    reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Compare every neuron of one expert with every neuron of another.

    Args:
        reference: An expert's tensors in the canonical layout, by the names of the experts
            contract: `gate_up_proj` [2 * intermediate, hidden] or `up_proj`
            [intermediate, hidden], `down_proj` [hidden, intermediate], and their biases.
        other: Those of another expert.

    Returns:
        float64 [intermediate of the reference, intermediate]: sums of the inner products of
        gate rows, up rows and down columns, biases of hidden units included.
    """
    return _neurons(reference) @ _neurons(other).T


def align(
    reference: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Reorder an expert's neurons to be as like a reference's as they can.

    Args:
        reference: An expert, see `similarity`.
        other: The expert to reorder.

    Returns:
        The same expert, in another order.
    """
    gain = similarity(reference, other)
    _, assigned = linear_sum_assignment(gain.cpu().numpy(), maximize=True)
    order = torch.as_tensor(np.asarray(assigned), dtype=torch.int64)
    return {name: _reorder(name, tensor, order) for name, tensor in other.items()}


def merge_experts(
    experts: Mapping[str, torch.Tensor], shares: Sequence[float], reference: int
) -> dict[str, torch.Tensor]:
    """Average experts after aligning them to one of them.

    Args:
        experts: Members, see `similarity`, with an axis of members before the others.
        shares: Share of each member; they add up to 1.
        reference: Position of the member that the others are aligned to.

    Returns:
        The merged expert, in the members' type.
    """
    members = [
        {name: tensor[member] for name, tensor in experts.items()}
        for member in range(len(shares))
    ]
    aligned = [
        member if position == reference else align(members[reference], member)
        for position, member in enumerate(members)
    ]
    return {name: average([member[name] for member in aligned], shares) for name in experts}


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


def _neurons(expert: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Everything that moves with a neuron, in one row [intermediate, ...]."""
    down = expert["down_proj"].double().T
    parts = [down]
    for name, tensor in expert.items():
        if not name.startswith("down"):
            rows = tensor.double().reshape(tensor.shape[0], -1)
            parts.extend(torch.split(rows, len(down)))
    return torch.cat(parts, dim=1)


def _reorder(name: str, tensor: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    if name == "down_proj":
        return tensor[:, order]
    if name == "down_proj_bias":
        return tensor
    # Gate rows, then up rows: one permutation moves both.
    halves: torch.Tensor = torch.unflatten(tensor, 0, (-1, len(order)))
    return halves[:, order].flatten(0, 1)
