"""top-p: a token uses the fewest experts that reach a share of its router probability.

With P_i1 >= P_i2 >= ... what token i's router gives its experts::

    k_i = min { k : sum_{j <= k} P_ij >= p }

(Huang et al., 2024, https://arxiv.org/abs/2403.07652, equation 4; one p for all layers). The
paper trains models with it; here p is chosen so that tokens of the task use as many experts as
asked on average, and nothing is trained. Ada-K warms its allocators up with the same rule
(https://arxiv.org/abs/2410.10456, "P-Warm").
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from edgemoe.allocate.budget import check_mean, check_tokens, default_mean
from edgemoe.allocate.cumulative import cumulative_of, find_share
from edgemoe.errors import AllocationError
from edgemoe.k_rule import KRule
from edgemoe.models.k_policy import most_slots

if TYPE_CHECKING:
    from edgemoe.oracle.oracle import LayerOracle


def top_p(
    oracle: LayerOracle,
    mean_k: float | None,
    seed: int,
    *,
    p: float = 0.0,
    k_max: int = 0,
    tokens: int = 4096,
) -> tuple[KRule, ...]:
    """Use, for every token, the fewest experts that hold a share of its router probability.

    Args:
        oracle: The model and the task's tokens.
        mean_k: Experts per token and layer that p is chosen for, in [1, k_max]; two thirds of
            top_k where it is None.
        seed: Not used.
        p: The share, in (0, 1]; 0 chooses it by `mean_k`.
        k_max: Most experts of a token; 0 for the router's own top_k.
        tokens: How many tokens choose p.

    Returns:
        A rule for each MoE layer.

    Raises:
        AllocationError: The share or the mean is out of range, both are given, or a router
            follows no known rule.
        StreamingError: The family cannot be run layer by layer.
    """
    del seed
    check_tokens(tokens)
    layers = oracle.moe.layers
    most = [min(k_max, most_slots(layer)) if k_max else layer.top_k for layer in layers]
    if p and mean_k is not None:
        raise AllocationError(
            f"top-p must have a share or a mean, got p={p:g} and {mean_k:g}. Leave one out."
        )
    # Graphs compare in float32, where a smaller one is no share at all.
    if not (p == 0 or float(np.float32(p)) > 0) or not p <= 1:
        raise AllocationError(f"p must be in (0, 1], got {p:g}. Choose another.")
    if not p:
        wanted = default_mean(layers) if mean_k is None else mean_k
        p = find_share(cumulative_of(oracle.fewer(tokens), most), check_mean(wanted, most))
    return tuple(KRule(slots=slots, top_p=p) for slots in most)
