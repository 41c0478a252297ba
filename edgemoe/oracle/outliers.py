"""How many outliers the weights of each layer's experts have.

OWL (Yin et al., 2023, https://arxiv.org/abs/2310.05175): with X_c the inputs of column c of a
weight matrix W over all tokens, an entry matters as ::

    A_rc = |W_rc| * || X_c ||_2

and a layer has outliers in the proportion D_l, the fraction of its entries with
`A_rc > M * mean(A of the layer)`. The paper takes all matrices of a decoder layer. Here they
are those of its routed experts, which alone are cut, each with the tokens that are routed to
it; entries of an expert that no token reaches are 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.errors import PlanError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from edgemoe.oracle.oracle import LayerOracle, LayerView


def outlier_ratios(oracle: LayerOracle, multiple: float) -> NDArray[np.float64]:
    """Measure D_l of every MoE layer.

    Args:
        oracle: The model and the tokens.
        multiple: M, in (0, inf).

    Returns:
        float64 [moe layers], each in [0, 1].

    Raises:
        PlanError: Experts were factored, or share bases: their matrices are not there.
        StreamingError: The family cannot be run layer by layer.
    """
    if any(layer.is_factored or layer.is_based for layer in oracle.moe.layers):
        raise PlanError(
            "outliers must be counted in experts of whole matrices, got a checkpoint that was "
            "decomposed. Prune first, then decompose; or use --layers uniform."
        )
    found = [_ratio(view, multiple) for view in oracle.walk("count outliers")]
    return np.array(found, np.float64)


@torch.no_grad()
def _ratio(view: LayerView, multiple: float) -> float:
    matrices = list(_matrices(view))
    entries = sum(weight.numel() for weight, _ in matrices)
    # Twice over the weights, so that no layer's A is ever in memory whole.
    mean = sum(float(_matter(*pair).sum(dtype=torch.float64)) for pair in matrices) / entries
    outliers = sum(int((_matter(*pair) > multiple * mean).sum()) for pair in matrices)
    return outliers / entries


def _matrices(view: LayerView) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield every matrix [rows, columns] with || X_c ||_2, float32 [columns]."""
    layer = view.layer
    gate_up, down = layer.gate_up, layer.down
    for expert in range(layer.num_experts):
        inputs = view.hidden[(view.routing.indices == expert).any(dim=1)]
        yield gate_up[expert], _norms(inputs)
        yield down[expert], _norms(layer.expert_units(expert, inputs))


def _norms(inputs: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = inputs.double().norm(dim=0)
    return norms.float()


def _matter(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    return weight.float().abs() * norms
