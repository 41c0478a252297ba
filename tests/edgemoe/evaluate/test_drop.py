"""Drops and their paired intervals against loops, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import bootstrap, norm, t

from edgemoe.evaluate.drop import Drop, measure_drop, paired_drop
from edgemoe.evaluate.evaluation import Evaluation
from edgemoe.evaluate.intervals import (
    bootstrap_mean,
    bootstrap_perplexity,
    expanded_percentiles,
)


def of_losses(losses: np.ndarray, tokens: np.ndarray) -> Evaluation:
    value = float(np.exp(losses.sum() / tokens.sum()))
    return Evaluation(
        task="t",
        metric="perplexity",
        value=value,
        ci95=(value, value),
        n=len(losses),
        perplexity=value,
        tokens=int(tokens.sum()),
        line_losses=tuple(losses.tolist()),
        line_tokens=tuple(tokens.tolist()),
    )


def of_hits(hits: np.ndarray) -> Evaluation:
    value = float(hits.mean())
    return Evaluation(
        task="t",
        metric="accuracy",
        value=value,
        ci95=(value, value),
        n=len(hits),
        perplexity=1.0,
        tokens=len(hits),
        line_losses=(0.0,) * len(hits),
        line_tokens=(1,) * len(hits),
        line_hits=tuple(hits.astype(int).tolist()),
    )


def test_a_rise_of_perplexity_is_bootstrapped_over_pairs() -> None:
    random = np.random.Generator(np.random.PCG64(5))
    tokens = random.integers(5, 60, size=80)
    # Lines differ much from one another, and little between the two models.
    before = tokens * random.normal(3.0, 0.8, size=80)
    after = before + tokens * random.normal(0.05, 0.05, size=80)
    found = paired_drop(of_losses(before, tokens), of_losses(after, tokens))

    def ratio(first: np.ndarray, second: np.ndarray, counts: np.ndarray) -> float:
        perplexities = [np.exp(part.sum() / counts.sum()) for part in (first, second)]
        return float(perplexities[1] / perplexities[0] - 1)

    assert found.value == pytest.approx(ratio(before, after, tokens))
    # The same draws, each scoring both models on the lines that it drew.
    stochastic = np.random.Generator(np.random.PCG64(0)).integers(80, size=(1000, 80))
    resampled = [ratio(before[lines], after[lines], tokens[lines]) for lines in stochastic]
    assert found.ci95 == pytest.approx(
        tuple(np.percentile(resampled, expanded_percentiles(80)))
    )
    theirs = bootstrap(
        (before, after, tokens),
        ratio,
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose(found.ci95, (theirs.low, theirs.high), atol=0.15 * width)
    # Unpaired, the two intervals would overlap widely: nothing could be said.
    assert 0 < found.ci95[0] < found.ci95[1] < 0.1


def test_a_fall_of_accuracy_is_bootstrapped_over_pairs() -> None:
    random = np.random.Generator(np.random.PCG64(6))
    before = random.random(300) < 0.7
    after = np.where(random.random(300) < 0.3, random.random(300) < 0.5, before)
    found = paired_drop(of_hits(before), of_hits(after))
    assert found.value == pytest.approx(before.mean() - after.mean())
    theirs = bootstrap(
        (before.astype(float), after.astype(float)),
        lambda first, second: first.mean() - second.mean(),
        paired=True,
        vectorized=False,
        method="percentile",
        n_resamples=4000,
        rng=np.random.default_rng(1),
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose(found.ci95, (theirs.low, theirs.high), atol=0.15 * width)


def test_few_lines_make_a_wider_interval_and_it_covers() -> None:
    random = np.random.Generator(np.random.PCG64(8))
    lines, trials = 6, 1000
    tokens = np.full(lines, 20)
    covered = bare = 0
    for _ in range(trials):
        # The drop of the whole population is exp(0.05) - 1; lines differ in it.
        before = tokens * random.normal(3.0, 0.8, size=lines)
        losses = tokens * random.normal(0.05, 0.05, size=lines)
        low, high = paired_drop(
            of_losses(before, tokens), of_losses(before + losses, tokens)
        ).ci95
        covered += low <= np.expm1(0.05) <= high
        low, high = bootstrap_perplexity(losses, tokens.astype(np.float64))
        bare += low <= np.exp(0.05) <= high
    assert 0.92 <= covered / trials <= 0.98
    assert bare / trials < 0.9


def test_expanded_percentiles_are_hesterbergs() -> None:
    for lines in (2, 5, 20, 300):
        reach = np.sqrt(lines / (lines - 1)) * t.ppf(0.975, lines - 1)
        expected = 100 * norm.cdf([-reach, reach])
        np.testing.assert_allclose(expanded_percentiles(lines), expected, atol=1e-9)
    # Of many lines they are those of any bootstrap.
    np.testing.assert_allclose(expanded_percentiles(10**6), (2.5, 97.5), atol=1e-4)
    assert expanded_percentiles(1) == (0, 100)


def test_few_lines_that_changed_do_not_make_an_accuracy_certain() -> None:
    random = np.random.Generator(np.random.PCG64(7))
    lines, truth, trials = 40, 0.05, 400
    covered = bare = 0
    for _ in range(trials):
        lost = random.random(lines) < truth
        found = paired_drop(of_hits(np.ones(lines)), of_hits(1 - lost))
        assert found.ci95[0] <= found.value <= found.ci95[1]
        covered += found.ci95[1] >= truth
        bare += bootstrap_mean(lost.astype(np.float64))[1] >= truth
    assert covered / trials >= 0.95
    assert bare / trials < 0.9
    # Nobody knows of 40 lines that stayed right whether the 41st does.
    same = paired_drop(of_hits(np.ones(40)), of_hits(np.ones(40)))
    assert same.value == 0
    assert same.ci95[1] == -same.ci95[0] == pytest.approx(0.0876, abs=1e-4)


def test_the_same_perplexity_has_no_drop_and_other_lines_are_refused() -> None:
    tokens = np.array([3, 4, 5])
    one = of_losses(np.array([1.0, 2.0, 3.0]), tokens)
    assert paired_drop(one, one) == Drop(0.0, (0.0, 0.0))
    better = of_losses(np.array([1.0, 2.0, 2.0]), tokens)
    assert measure_drop(one, better) < 0
    with pytest.raises(ValueError, match="must be of the same lines"):
        paired_drop(one, of_losses(np.array([1.0, 2.0, 3.0]), np.array([3, 4, 6])))
    with pytest.raises(ValueError, match="must be of the same lines"):
        paired_drop(one, of_hits(np.ones(3)))
