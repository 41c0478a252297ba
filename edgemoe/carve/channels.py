"""Which channel goes where: shared channels, and balanced clusters of the others.

CMoE (https://arxiv.org/abs/2502.04416): a channel is active for a token when its output is
among the largest of the layer; channels that are active for many tokens are shared by all,
the rest are clustered by which tokens activate them together, into experts of equal size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import CarveError

if TYPE_CHECKING:
    from numpy.typing import NDArray

ACTIVE_FRACTION = 0.15
"""Share of a layer's neurons that count as active for a token."""

_ROUNDS = 12


@dataclass(frozen=True, kw_only=True)
class NeuronAssignment:
    """Where each channel of one layer goes.

    Attributes:
        shared: int64 `[shared_size]`, ascending: channels that every token uses.
        experts: int64 `[experts, expert_size]`, each row ascending.
    """

    shared: NDArray[np.int64]
    experts: NDArray[np.int64]

    def __post_init__(self) -> None:
        everyone = np.concatenate([self.shared, self.experts.reshape(-1)])
        if not np.array_equal(np.sort(everyone), np.arange(everyone.size)):
            raise CarveError(
                "an assignment must place every neuron exactly once, got "
                f"{np.unique(everyone).size} different neurons in {everyone.size} places."
            )

    @property
    def order(self) -> NDArray[np.int64]:
        """int64 `[intermediate_size]`: shared channels first, then expert by expert."""
        return np.concatenate([self.shared, self.experts.reshape(-1)])


def active_neurons(
    activations: NDArray[np.float32], down_norms: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Mark the channels that matter for each token.

    Args:
        activations: float32 `[tokens, neurons]`.
        down_norms: float32 `[neurons]`: norm of each channel's column of `down_proj`.

    Returns:
        bool `[tokens, neurons]`: true for the `ACTIVE_FRACTION` of channels whose
        output norm `|h| * ||w_down||` is largest for the token.
    """
    scores = np.abs(activations) * down_norms
    keep = max(1, round(scores.shape[1] * ACTIVE_FRACTION))
    threshold = np.partition(scores, -keep, axis=1)[:, -keep][:, None]
    return scores >= threshold


def assign_neurons(
    active: NDArray[np.bool_], *, experts: int, shared_size: int, seed: int
) -> NeuronAssignment:
    """Share the most frequent channels and cluster the others into balanced experts.

    Args:
        active: bool `[tokens, neurons]`.
        experts: Number of experts, at least 2.
        shared_size: Number of shared channels.
        seed: Decides the first cluster centres.

    Returns:
        The assignment; the same for the same arguments.

    Raises:
        CarveError: The channels that are left do not divide into the experts.
    """
    neurons = active.shape[1]
    if experts < 2 or not 0 <= shared_size < neurons or (neurons - shared_size) % experts:
        raise CarveError(
            f"neurons left after sharing must divide into at least 2 experts, got {neurons} "
            f"neurons, {shared_size} shared, {experts} experts. Change --experts or "
            "--shared-fraction."
        )
    frequency = active.sum(axis=0)
    by_frequency = np.argsort(-frequency, kind="stable")
    shared = np.sort(by_frequency[:shared_size])
    routed = np.sort(by_frequency[shared_size:])
    size = (neurons - shared_size) // experts
    labels = _balanced_k_means(active[:, routed].T.astype(np.float32), experts, size, seed)
    rows = np.stack([np.sort(routed[labels == cluster]) for cluster in range(experts)])
    return NeuronAssignment(shared=shared.astype(np.int64), experts=rows.astype(np.int64))


def _balanced_k_means(
    features: NDArray[np.float32], clusters: int, size: int, seed: int
) -> NDArray[np.int64]:
    """k-means whose clusters all hold `size` rows, by optimal assignment in each round."""
    from scipy.optimize import linear_sum_assignment

    norms = np.linalg.norm(features, axis=1, keepdims=True)
    rows = features / np.maximum(norms, 1e-6)
    generator = np.random.default_rng(seed)
    centres = rows[_spread_out(rows, clusters, generator)]
    labels = np.full(rows.shape[0], -1, dtype=np.int64)
    for _ in range(_ROUNDS):
        similarity = rows @ centres.T
        _, slots = linear_sum_assignment(np.repeat(-similarity, size, axis=1))
        updated = np.asarray(slots // size, dtype=np.int64)
        if np.array_equal(updated, labels):
            break
        labels = updated
        centres = np.stack(
            [rows[labels == cluster].mean(axis=0) for cluster in range(clusters)]
        )
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-6)
    return labels


def _spread_out(
    rows: NDArray[np.float32], count: int, generator: np.random.Generator
) -> list[int]:
    """k-means++ seeding."""
    chosen = [int(generator.integers(rows.shape[0]))]
    distance = np.maximum(1.0 - rows @ rows[chosen[0]], 0.0)
    for _ in range(count - 1):
        total = float(distance.sum())
        weights = distance / total if total > 0 else None
        chosen.append(int(generator.choice(rows.shape[0], p=weights)))
        distance = np.minimum(distance, np.maximum(1.0 - rows @ rows[chosen[-1]], 0.0))
    return chosen
