"""The sums against their definition, token by token; and that they add up."""

import itertools
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.calibrate.sums import SUM_NAMES, LayerSums, sum_shape

EXACT = {"tokens", "count", "coactivation"}


def draw_tokens(
    seed: int, tokens: int, experts: int, top_k: int, *, capped: bool = False
) -> tuple[Any, ...]:
    random = np.random.Generator(np.random.PCG64(seed))
    logits = random.normal(size=(tokens, experts))
    indices = np.argsort(-random.random((tokens, experts)), axis=1)[:, :top_k]
    weights = random.random((tokens, top_k)) * 2 + 0.1
    if capped:
        indices[:, 1:] = experts
    return logits, weights, indices, random.random((tokens, top_k)) * 5


def test_every_sum_equals_its_definition() -> None:
    for capped in (False, True):
        logits, weights, indices, norms = draw_tokens(1, 23, 6, 3, capped=capped)
        sums = LayerSums.of_tokens(logits, weights, indices, norms)
        expected = {name: np.zeros(sum_shape(name, 6)) for name in SUM_NAMES}
        expected["tokens"] = np.asarray(23.0)
        for t in range(23):
            used = [s for s in range(3) if indices[t, s] < 6]
            mass = sum(weights[t, s] for s in used)
            for s in used:
                j, gate = indices[t, s], weights[t, s] / mass
                expected["count"][j] += 1
                expected["gate_mass"][j] += gate
                expected["gate_norm"][j] += gate * norms[t, s]
                expected["norm"][j] += norms[t, s]
                expected["norm_squared"][j] += norms[t, s] ** 2
                for other in used:
                    expected["coactivation"][j, indices[t, other]] += 1
            expected["logit_gram"] += np.outer(logits[t], logits[t])
        for name, value in sums.as_dict().items():
            np.testing.assert_allclose(
                value, expected[name], rtol=1e-12, atol=1e-15, err_msg=name
            )
            if name in EXACT:
                assert (value == expected[name]).all(), name


@given(
    seed=st.integers(0, 2**32),
    experts=st.integers(1, 9),
    cuts=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    scale=st.sampled_from([1e-9, 1.0, 1e4]),
    data=st.data(),
)
def test_parts_add_up_to_the_whole(
    seed: int, experts: int, cuts: list[int], scale: float, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    logits, weights, indices, norms = draw_tokens(seed, 40, experts, top_k)
    tokens: tuple[Any, ...] = (logits * scale, weights, indices, norms * scale)
    whole = LayerSums.of_tokens(*tokens)
    parts = [
        LayerSums.of_tokens(*(part[start:stop] for part in tokens))
        for start, stop in itertools.pairwise([0, *sorted(cuts), 40])
    ]
    total = sum(parts, start=LayerSums.zeros(experts))
    for name, value in total.as_dict().items():
        expected = getattr(whole, name)
        if name in EXACT:
            assert (value == expected).all(), name
        atol = 1e-12 * max(1.0, scale**2)
        np.testing.assert_allclose(value, expected, rtol=1e-12, atol=atol, err_msg=name)
    assert total.count.sum() == 40 * top_k
    np.testing.assert_allclose(total.gate_mass.sum(), 40, rtol=1e-12)

    # Another order and other brackets: the same bytes.
    shuffled = data.draw(st.permutations(parts))
    middle = data.draw(st.integers(0, len(parts)))
    zeros = LayerSums.zeros(experts)
    again = sum(shuffled[middle:], start=zeros) + sum(shuffled[:middle], start=zeros)
    for name, array in total.to_arrays().items():
        assert array.tobytes() == again.to_arrays()[name].tobytes(), name


@given(seed=st.integers(0, 2**32), factor=st.floats(1e-3, 1e3))
def test_a_routed_scaling_factor_cancels(seed: int, factor: float) -> None:
    logits, weights, indices, norms = draw_tokens(seed, 7, 5, 2)
    plain = LayerSums.of_tokens(logits, weights, indices, norms)
    scaled = LayerSums.of_tokens(logits, weights * factor, indices, norms)
    np.testing.assert_allclose(scaled.gate_norm, plain.gate_norm, rtol=1e-12)
