"""Where neurons go."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.carve.channels import active_neurons, assign_neurons


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(2, 6),
    size=st.integers(1, 5),
    shared=st.integers(0, 9),
    seed=st.integers(0, 100),
)
def test_every_neuron_has_one_place_and_the_most_active_are_shared(
    experts: int, size: int, shared: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    neurons = experts * size + shared
    active = generator.random((40, neurons)) < generator.random(neurons)
    found = assign_neurons(active, experts=experts, shared_size=shared, seed=seed)
    assert sorted(found.order) == list(range(neurons))
    assert found.experts.shape == (experts, size)
    frequency = active.sum(axis=0)
    if shared:
        assert frequency[found.shared].min() >= frequency[found.experts].max()


def test_neurons_that_fire_together_share_an_expert() -> None:
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(4), 5)
    topics = generator.integers(4, size=300)
    active = (topics[:, None] == group) ^ (generator.random((300, 20)) < 0.05)
    order = generator.permutation(20)
    found = assign_neurons(active[:, order], experts=4, shared_size=0, seed=0)
    assert all(len(set(group[order[row]])) == 1 for row in found.experts)


def test_active_neurons_are_the_largest_outputs() -> None:
    generator = np.random.default_rng(0)
    activations = generator.standard_normal((7, 40)).astype(np.float32)
    norms = generator.random(40).astype(np.float32)
    found = active_neurons(activations, norms)
    for row, scores in zip(found, np.abs(activations) * norms, strict=True):
        assert set(np.flatnonzero(row)) == set(np.argsort(-scores)[:6])
