"""A linear router that predicts which experts a token will need.

Ridge regression from the hidden state to each expert's log energy: closed form, float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RIDGE = 1e-2
"""Ridge penalty, as a share of the mean second moment of the inputs."""


@dataclass(frozen=True, kw_only=True)
class LinearRouter:
    """Scores `r(x) = W x + b`, one per expert; the largest are chosen.

    Attributes:
        weight: float32 `[experts, hidden_size]`.
        bias: float32 `[experts]`.
    """

    weight: NDArray[np.float32]
    bias: NDArray[np.float32]


def expert_energy(
    activations: NDArray[np.float32],
    down: NDArray[np.float32],
    experts: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Log of the squared norm of each expert's output.

    Args:
        activations: float32 `[tokens, neurons]`.
        down: float32 `[hidden_size, neurons]`: the dense `down_proj`.
        experts: int64 `[experts, expert_size]`: channels of each expert.

    Returns:
        float64 `[tokens, experts]`.
    """
    columns = []
    for neurons in experts:
        output = activations[:, neurons] @ down[:, neurons].T
        columns.append(np.log((output.astype(np.float64) ** 2).sum(axis=1) + 1e-12))
    return np.stack(columns, axis=1)


def fit_router(hidden: NDArray[np.float32], energy: NDArray[np.float64]) -> LinearRouter:
    """Fit the router by ridge regression.

    Only differences between experts decide which are chosen, so each token's mean over the
    experts is taken out of the target. Scores are scaled to unit standard deviation.

    Args:
        hidden: float32 `[tokens, hidden_size]`: what the router will see.
        energy: float64 `[tokens, experts]`.

    Returns:
        The router.
    """
    inputs = hidden.astype(np.float64)
    target = energy - energy.mean(axis=1, keepdims=True)
    input_mean, target_mean = inputs.mean(axis=0), target.mean(axis=0)
    centred = inputs - input_mean
    gram = centred.T @ centred / len(centred)
    penalty = RIDGE * float(np.trace(gram)) / gram.shape[0]
    cross = centred.T @ (target - target_mean) / len(centred)
    weight = np.linalg.solve(gram + penalty * np.eye(gram.shape[0]), cross).T
    bias = target_mean - weight @ input_mean
    scale = float((inputs @ weight.T + bias).std()) or 1.0
    return LinearRouter(
        weight=(weight / scale).astype(np.float32), bias=(bias / scale).astype(np.float32)
    )
