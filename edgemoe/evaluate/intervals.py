"""95% intervals: a bootstrap over lines for perplexity, Wilson's for accuracy."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

RESAMPLES = 1000
PERCENTILES = (2.5, 97.5)
_Z_95 = 1.959963984540054
_INDICES_AT_ONCE = 1_000_000


def bootstrap_perplexity(
    losses: NDArray[np.float64],
    tokens: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    percentiles: tuple[float, float] = PERCENTILES,
) -> tuple[float, float]:
    """Resample lines and take percentiles of exp(sum of losses / sum of tokens).

    Lines, not tokens, are drawn: tokens of one line depend on each other.

    Args:
        losses: Negative log-likelihood of each line in nats, float64 [lines].
        tokens: Scored tokens of each line, float64 [lines], in [1, inf).
        resamples: Number of resamples.
        seed: Seed of the draws.
        percentiles: Which, in [0, 100].

    Returns:
        The percentiles. One line alone gives an interval of no width.
    """
    low, high = np.exp(_resample(losses, tokens, resamples, seed, percentiles))
    return float(low), float(high)


def bootstrap_mean(
    values: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    seed: int = 0,
    percentiles: tuple[float, float] = PERCENTILES,
) -> tuple[float, float]:
    """Resample lines and take percentiles of their mean.

    Args:
        values: One value per line, float64 [lines].
        resamples: Number of resamples.
        seed: Seed of the draws.
        percentiles: Which, in [0, 100].

    Returns:
        The percentiles.
    """
    low, high = _resample(values, np.ones(len(values)), resamples, seed, percentiles)
    return float(low), float(high)


def expanded_percentiles(lines: int) -> tuple[float, float]:
    """Return the percentiles that make a bootstrap of few lines a 95% interval of their mean.

    Resamples of n lines spread less than means of n lines do, by sqrt((n - 1) / n), and their
    spread is itself an estimate, which Student's t accounts for. So the percentiles are at
    Phi(-/+ sqrt(n / (n - 1)) t(0.975; n - 1)) instead of 2.5% and 97.5%: the "expanded
    percentile interval" of Hesterberg (2015), https://arxiv.org/abs/1411.5279.

    Args:
        lines: n, in [1, inf).

    Returns:
        Percentiles, in [0, 100]; of one line, which tells nothing of others, 0 and 100.
    """
    from scipy.special import ndtr, stdtrit

    if lines == 1:
        return 0.0, 100.0
    reach = math.sqrt(lines / (lines - 1)) * float(stdtrit(lines - 1, 0.975))
    tail = 100 * float(ndtr(-reach))
    return tail, 100 - tail


def _resample(
    above: NDArray[np.float64],
    below: NDArray[np.float64],
    resamples: int,
    seed: int,
    percentiles: tuple[float, float],
) -> NDArray[np.float64]:
    """Return percentiles of sum(above) / sum(below) over drawn lines."""
    random = np.random.Generator(np.random.PCG64(seed))
    lines, values = len(above), []
    rows = max(1, _INDICES_AT_ONCE // lines)
    for start in range(0, resamples, rows):
        drawn = random.integers(lines, size=(min(rows, resamples - start), lines))
        values.append(above[drawn].sum(axis=1) / below[drawn].sum(axis=1))
    found: NDArray[np.float64] = np.percentile(np.concatenate(values), percentiles)
    return found


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """Return Wilson's score interval of a fraction, which stays sound at 0 and 1.

    (p + z^2/2n ± z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n) with p = hits/n, z = 1.96;
    https://en.wikipedia.org/wiki/Binomial_proportion_confidence_interval

    Args:
        hits: Successes, in [0, n].
        n: Trials, in [1, inf).

    Returns:
        Lower and upper end, in [0, 1].
    """
    fraction, square = hits / n, _Z_95**2
    centre = fraction + square / (2 * n)
    spread = _Z_95 * math.sqrt(fraction * (1 - fraction) / n + square / (4 * n * n))
    scale = 1 + square / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
