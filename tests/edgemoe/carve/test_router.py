"""The fitted router and what it is fitted to."""

from __future__ import annotations

import numpy as np
import pytest

from edgemoe.carve.router import expert_energy, fit_router


def test_router_is_the_ridge_solution() -> None:
    generator = np.random.default_rng(0)
    hidden = generator.standard_normal((500, 6)).astype(np.float32)
    truth = generator.standard_normal((4, 6))
    energy = hidden @ truth.T + np.array([3.0, 0.0, -1.0, 1.0])
    router = fit_router(hidden, energy)
    wanted = energy - energy.mean(axis=1, keepdims=True)
    scores = hidden @ router.weight.T + router.bias
    assert scores.std() == pytest.approx(1.0, abs=1e-3)
    assert np.corrcoef(scores.ravel(), wanted.ravel())[0, 1] > 0.999


def test_energy_is_the_norm_of_the_expert_output() -> None:
    generator = np.random.default_rng(0)
    activations = generator.standard_normal((5, 12)).astype(np.float32)
    down = generator.standard_normal((7, 12)).astype(np.float32)
    experts = np.arange(12).reshape(3, 4)
    found = expert_energy(activations, down, experts)
    for token in range(5):
        for expert in range(3):
            output = sum(activations[token, n] * down[:, n] for n in experts[expert])
            assert found[token, expert] == pytest.approx(np.log(np.sum(output**2)), rel=1e-5)
