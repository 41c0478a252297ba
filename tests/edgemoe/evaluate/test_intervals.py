"""Intervals against scipy and against the delta method."""

import numpy as np
import pytest
from scipy.stats import binomtest

from edgemoe.evaluate.intervals import bootstrap_perplexity, wilson_interval


@pytest.mark.parametrize(
    ("hits", "n"), [(0, 1), (0, 30), (30, 30), (1, 2), (17, 50), (999, 1000)]
)
def test_wilson_equals_scipys(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose(
        wilson_interval(hits, n), [expected.low, expected.high], atol=1e-12
    )


def test_bootstrap_agrees_with_the_delta_method_and_is_deterministic() -> None:
    random = np.random.Generator(np.random.PCG64(1))
    tokens = random.integers(5, 60, size=400).astype(np.float64)
    losses = tokens * random.normal(3.0, 0.5, size=400)
    low, high = bootstrap_perplexity(losses, tokens)
    assert (low, high) == bootstrap_perplexity(losses, tokens)
    mean = losses.sum() / tokens.sum()
    error = np.sqrt(((losses - mean * tokens) ** 2).sum()) / tokens.sum()
    expected = np.exp([mean - 1.96 * error, mean + 1.96 * error])
    np.testing.assert_allclose([low, high], expected, rtol=0.1 * error)


def test_bootstrap_of_few_or_equal_lines_and_of_many() -> None:
    assert bootstrap_perplexity(np.array([6.0]), np.array([3.0])) == pytest.approx(
        (np.exp(2), np.exp(2))
    )
    low, high = bootstrap_perplexity(np.full(2_000_000, 2.0), np.ones(2_000_000), resamples=3)
    assert (low, high) == pytest.approx((np.exp(2), np.exp(2)))
