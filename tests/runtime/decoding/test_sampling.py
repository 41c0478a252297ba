"""Token choice against plain references."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe_runtime.decoding.sampling import (
    Sampling,
    choose_token,
    keep_likely,
    log_probabilities,
)
from edgemoe_runtime.errors import BackendError

LOGITS = st.lists(
    st.floats(-30, 30, width=32, allow_subnormal=False), min_size=1, max_size=40
).map(lambda values: np.array(values, dtype=np.float32))


def reference(logits: list[float], sampling: Sampling) -> dict[int, float]:
    """Temperature, then top-k, then the smallest set that reaches top-p, one by one."""
    scaled = np.array(logits, dtype=np.float64) / sampling.temperature
    shares = np.exp(scaled - scaled.max())
    order = sorted(range(len(logits)), key=lambda token: (-shares[token], token))
    order = order[: sampling.top_k]
    total = sum(shares[token] for token in order)
    kept: list[int] = []
    for token in order:
        kept.append(token)
        if sampling.top_p < 1 and sum(shares[t] for t in kept) / total >= sampling.top_p:
            break
    mass = sum(shares[token] for token in kept)
    return {token: shares[token] / mass for token in kept}


@settings(deadline=None)
@given(
    LOGITS,
    st.floats(0.3, 4.0),
    st.one_of(st.none(), st.integers(1, 50)),
    st.one_of(st.just(1.0), st.floats(0.05, 0.999)),
)
def test_kept_tokens_equal_the_reference(
    logits: np.ndarray[tuple[int], np.dtype[np.float32]],
    temperature: float,
    top_k: int | None,
    top_p: float,
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, probabilities = keep_likely(logits, sampling)
    expected = reference(logits.tolist(), sampling)
    # where rounding decides whether a token still belongs, either answer is right
    borderline = abs(len(expected) - len(tokens)) == 1
    if not borderline:
        assert tokens.tolist() == list(expected)
        np.testing.assert_allclose(probabilities, list(expected.values()), rtol=1e-9)
    assert probabilities.sum() == pytest.approx(1.0)
    assert (np.diff(probabilities) <= 1e-12).all()
    chosen = choose_token(logits, sampling, np.random.default_rng(0))
    assert chosen in tokens


def test_frequencies_follow_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    generator = np.random.default_rng(0)
    draws = [choose_token(logits, Sampling(temperature=1.0), generator) for _ in range(4000)]
    shares = np.bincount(draws, minlength=4) / len(draws)
    np.testing.assert_allclose(shares, [0.5, 0.3, 0.15, 0.05], atol=0.03)


@given(LOGITS)
def test_greedy_takes_the_first_of_the_highest(
    logits: np.ndarray[tuple[int], np.dtype[np.float32]],
) -> None:
    chosen = choose_token(logits, Sampling(), np.random.default_rng(0))
    assert chosen == logits.tolist().index(max(logits.tolist()))


@given(st.lists(LOGITS.filter(lambda row: len(row) >= 4), min_size=1, max_size=5))
def test_log_probabilities_are_normalised(
    rows: list[np.ndarray[tuple[int], np.dtype[np.float32]]],
) -> None:
    logits = np.stack([row[:4] for row in rows])
    likely = [
        log_probabilities(logits, np.full(len(rows), token, dtype=np.int64))
        for token in range(4)
    ]
    np.testing.assert_allclose(np.exp(likely).sum(axis=0), 1.0, rtol=1e-5)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_broken_logits_are_an_error(broken: float) -> None:
    logits = np.array([0.0, broken], dtype=np.float32)
    with pytest.raises(BackendError, match="finite"):
        choose_token(logits, Sampling(), np.random.default_rng(0))
    with pytest.raises(BackendError, match="finite"):
        log_probabilities(logits[None], np.array([0]))
