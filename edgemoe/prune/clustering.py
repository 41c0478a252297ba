"""Spectral clustering of few points, the same for the same seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import eigh

if TYPE_CHECKING:
    from numpy.typing import NDArray

_RESTARTS = 32
_MAX_ROUNDS = 300


def cluster_spectrally(
    affinity: NDArray[np.float64], clusters: int, *, seed: int
) -> NDArray[np.int64]:
    """Cluster as Ng, Jordan and Weiss (2001) do.

    Args:
        affinity: Symmetric similarities, float64 [points, points] in [0, inf).
        clusters: Clusters to make, in [1, points].
        seed: Seed of the k-means restarts.

    Returns:
        Cluster of each point, int64 [points]; clusters are numbered by their first point and
        none is empty.
    """
    points = len(affinity)
    if clusters == points:
        return np.arange(points)
    off_diagonal = affinity * (1 - np.eye(points))
    degree = off_diagonal.sum(axis=1)
    scale = np.divide(1, np.sqrt(degree), out=np.zeros(points), where=degree > 0)
    normalised = off_diagonal * np.outer(scale, scale)
    _, vectors = eigh(normalised, subset_by_index=[points - clusters, points - 1])
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return k_means(rows, clusters, seed=seed)


def k_means(
    points: NDArray[np.float64], clusters: int, *, seed: int, restarts: int = _RESTARTS
) -> NDArray[np.int64]:
    """Run Lloyd's algorithm from several k-means++ starts and keep the best.

    Args:
        points: float64 [points, dimensions].
        clusters: Clusters to make, in [1, points].
        seed: Seed of the starts.
        restarts: Number of starts.

    Returns:
        Cluster of each point, int64 [points]; clusters are numbered by their first point and
        none is empty.
    """
    random = np.random.Generator(np.random.PCG64(seed))
    best, best_cost = np.zeros(len(points), np.int64), np.inf
    for _ in range(restarts):
        labels, cost = _lloyd(points, _seed_centres(points, clusters, random))
        # A cost that differs by rounding only must not decide.
        if cost < best_cost * (1 - 1e-9) or not np.isfinite(best_cost):
            best, best_cost = labels, cost
    _, first, labels = np.unique(best, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[labels]


def _seed_centres(
    points: NDArray[np.float64], clusters: int, random: np.random.Generator
) -> NDArray[np.float64]:
    """Draw k-means++ centres (Arthur and Vassilvitskii, 2007) at different points."""
    chosen = [int(random.integers(len(points)))]
    while len(chosen) < clusters:
        weights = _squared_distances(points, points[chosen]).min(axis=1)
        weights[chosen] = 0
        if weights.sum() == 0:
            weights = np.ones(len(points))
            weights[chosen] = 0
        chosen.append(int(random.choice(len(points), p=weights / weights.sum())))
    return points[chosen]


def _lloyd(
    points: NDArray[np.float64], centres: NDArray[np.float64]
) -> tuple[NDArray[np.int64], float]:
    labels = np.full(len(points), -1)
    for _ in range(_MAX_ROUNDS):
        distances = _squared_distances(points, centres)
        found = _fill_empty(distances.argmin(axis=1), distances)
        if np.array_equal(found, labels):
            break
        labels = found
        centres = np.stack([points[labels == k].mean(axis=0) for k in range(len(centres))])
    cost = float(((points - centres[labels]) ** 2).sum())
    return labels, cost


def _fill_empty(labels: NDArray[np.int64], distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """Move into each empty cluster the point that is farthest from its centre and not alone."""
    labels = labels.copy()
    for cluster in range(distances.shape[1]):
        if (labels == cluster).any():
            continue
        own = distances[np.arange(len(labels)), labels]
        alone = np.bincount(labels, minlength=distances.shape[1])[labels] == 1
        labels[np.argmax(np.where(alone, -1.0, own))] = cluster
    return labels


def _squared_distances(
    points: NDArray[np.float64], centres: NDArray[np.float64]
) -> NDArray[np.float64]:
    differences = points[:, None, :] - centres[None, :, :]
    squared: NDArray[np.float64] = (differences**2).sum(axis=2)
    return squared
