"""The rule of `--max-drop`: the upper end of a paired interval, from enough evidence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.evaluate.drop import paired_drop
from edgemoe.evaluate.evaluation import Evaluation
from edgemoe.evaluate.gate import MINIMUM_LINES, find_limit_fault, find_weaknesses, judge_drop
from edgemoe.evaluate.intervals import bootstrap_perplexity, wilson_interval

VOCABULARY = 500


def of_losses(losses: Any) -> Evaluation:
    """A score of lines of ten tokens."""
    found, tokens = np.asarray(losses, np.float64), np.full(len(losses), 10)
    value = float(np.exp(found.sum() / tokens.sum()))
    return Evaluation(
        task="t",
        metric="perplexity",
        value=value,
        ci95=bootstrap_perplexity(found, tokens.astype(np.float64)),
        n=len(found),
        perplexity=value,
        tokens=int(tokens.sum()),
        line_losses=tuple(found.tolist()),
        line_tokens=tuple(tokens.tolist()),
    )


def of_hits(hits: list[bool], choices: int = 4) -> Evaluation:
    """A score of questions with so many choices."""
    return Evaluation(
        task="t",
        metric="accuracy",
        value=sum(hits) / len(hits),
        ci95=wilson_interval(sum(hits), len(hits)),
        n=len(hits),
        perplexity=1.0,
        tokens=len(hits),
        details={"accuracy_of_chance": 1 / choices},
        line_losses=(0.0,) * len(hits),
        line_tokens=(1,) * len(hits),
        line_hits=tuple(map(int, hits)),
    )


lines = st.lists(st.tuples(st.floats(5, 60), st.floats(-3, 10)), min_size=2, max_size=60)
answers = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


@given(lines, st.floats(0, 1))
def test_a_perplexity_holds_where_its_upper_end_does(
    pairs: list[tuple[float, float]], limit: float
) -> None:
    before = of_losses([one for one, _ in pairs])
    after = of_losses([one + more for one, more in pairs])
    judged = judge_drop(before, after, VOCABULARY)
    upper = paired_drop(before, after).ci95[1]
    assert judged.holds(limit) == (upper <= limit + 1e-6)
    assert judged.drop.value <= upper + 1e-9
    # Who holds one limit holds every larger one.
    assert not judged.holds(limit) or judged.holds(limit + 0.1)
    assert judged.weak == find_weaknesses(before, VOCABULARY)
    assert (len(pairs) < MINIMUM_LINES) == any("fewer than 20" in text for text in judged.weak)
    assert str(len(pairs)) in str(judged)


@given(answers, st.integers(2, 5))
def test_an_accuracy_must_be_above_chance_before(
    pairs: list[tuple[bool, bool]], choices: int
) -> None:
    before, after = (of_hits([pair[side] for pair in pairs], choices) for side in (0, 1))
    judged = judge_drop(before, after, VOCABULARY)
    low, _ = wilson_interval(sum(one for one, _ in pairs), len(pairs))
    assert judged.chance == 1 / choices
    assert (low <= 1 / choices) == any("better than chance" in text for text in judged.weak)
    # A limit of 1 is no limit of an accuracy.
    assert judged.holds(1.0)


def test_a_point_within_the_limit_is_not_enough() -> None:
    draw = np.random.default_rng(0)
    losses = draw.uniform(20, 30, size=40)
    after = losses + draw.normal(0.4, 2.0, size=40)
    judged = judge_drop(of_losses(losses), of_losses(after), VOCABULARY)
    assert 0 < judged.drop.value < 0.15 < judged.drop.ci95[1]
    assert not judged.holds(0.15)
    assert judged.weak == ()
    assert "40 held-out lines, chance 500" in str(judged)


def test_a_perplexity_of_chance_is_weak_evidence() -> None:
    uniform = of_losses(np.full(30, 10 * np.log(VOCABULARY)))
    assert "not better than chance, 500" in find_weaknesses(uniform, VOCABULARY)[0]


@pytest.mark.parametrize(
    ("limit", "kind", "accepted", "message"),
    [
        (0.05, "text", False, None),
        (1.0, "choice", False, None),
        (2.0, "choice", True, "For 2% give 0.02"),
        (2.0, "completion", False, "200% more, 3 times the perplexity. For 2% give 0.02"),
        (500.0, "text", False, "Leave it out for no gate"),
        (2.0, "text", True, None),
        (-0.1, "text", True, "must be in [0, inf), got -0.1"),
        (float("nan"), "choice", True, "must be in [0, inf)"),
        (float("inf"), "text", True, "must be in [0, inf)"),
    ],
)
def test_a_limit_that_is_hardly_meant_is_refused(
    limit: float, kind: Any, accepted: bool, message: str | None
) -> None:
    found = find_limit_fault(limit, kind, accept_large=accepted)
    assert found is None if message is None else message in str(found)
