"""svd-whitened: SVD-LLM v2 (Wang et al., 2025) for experts.

https://arxiv.org/abs/2503.12340. The factors of a matrix W minimise ||W X - W' X||_F over the
inputs X that it meets (`edgemoe.decompose.truncation` has the formula), instead of
||W - W'||_F. The paper is about dense models; for an expert j this file decides:

- X of the first product is what reaches the tokens that are routed to j, each counted once,
  whatever its gate. Layers before are compressed already, so it is what j will meet.
- X of the second product is what j computes from the same tokens with its first product already
  factored, again what it will meet.
- Few tokens may reach an expert. The second moment that is used is that of the routed tokens
  plus `prior_tokens` times the mean over all tokens of the sample, as if so many more had
  come, drawn from what the layer sees::

      S_j = sum_{t routed to j} x_t x_t^T + prior_tokens / T * sum_t x_t x_t^T

  with x_t, for the second product, what j would compute from token t.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemoe.decompose.layer_factors import expert_matrices, gather_factors
from edgemoe.decompose.truncation import second_moment, truncate

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.decompose.layer_factors import LayerFactors
    from edgemoe.decompose.truncation import Truncation
    from edgemoe.oracle.oracle import LayerView


@torch.no_grad()
def svd_whitened(
    view: LayerView, ranks: Sequence[tuple[int, int]], *, prior_tokens: int = 64
) -> LayerFactors:
    """Factor a layer's experts by what they do to the tokens that reach them.

    Args:
        view: A layer of whole experts on all tokens, its weights in memory; it is not changed.
        ranks: Of each expert the ranks of its first and its second product.
        prior_tokens: How many tokens the mean over all tokens counts for, in [0, inf). At 0 an
            expert that no token reaches is factored as by plain SVD.

    Returns:
        The factors whose outputs are nearest, in Frobenius norm, to those of the weights.
    """
    return gather_factors(view.layer, _factor_experts(view, ranks, prior_tokens))


def _factor_experts(
    view: LayerView, ranks: Sequence[tuple[int, int]], prior_tokens: int
) -> Iterator[tuple[Truncation, Truncation]]:
    layer, hidden = view.layer, view.hidden
    prior = prior_tokens / len(hidden)
    common = prior * second_moment(hidden) if prior else None
    for expert, (up_rank, down_rank) in enumerate(ranks):
        routed = (view.routing.indices == expert).any(dim=1)
        up, down = expert_matrices(layer, expert)
        inputs = second_moment(hidden[routed])
        first = truncate(up, up_rank, inputs if common is None else inputs + common)
        if common is None:
            moment = second_moment(_activations(view, expert, first, hidden[routed]))
        else:
            units = _activations(view, expert, first, hidden)
            moment = second_moment(units[routed]) + prior * second_moment(units)
        yield first, truncate(down, down_rank, moment)


def _activations(
    view: LayerView, expert: int, first: Truncation, hidden: torch.Tensor
) -> torch.Tensor:
    """Run an expert up to its second product, with its first one factored."""
    layer, layout = view.layer, view.layer.layout
    bias = None
    if layout.has_bias:
        bias = layer.tensor(f"{layer.spec.experts}.{layout.gate_up_name}_bias")[expert]
    inner, outer = (factor.to(hidden.dtype) for factor in (first.inner, first.outer))
    thin = nn.functional.linear(hidden, inner)
    return layer.activate(nn.functional.linear(thin, outer, bias))
