from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe.calibrate.mixture import mix, spread_windows
from edgemoe.calibrate.sample import TokenSample, Window
from edgemoe.calibrate.statistics import Statistics
from edgemoe.calibrate.sums import SUM_NAMES, LayerSums
from edgemoe.calibrate.task_statistics import Source, TaskStatistics
from edgemoe.errors import StatisticsError
from edgemoe.models.shapes import LayerShape, ModelShape

SHAPE = ModelShape(
    family="mixtral",
    layers=tuple(LayerShape(layer=n, num_experts=4 + n, top_k=2) for n in (0, 2)),
    hidden_size=8,
    intermediate_size=4,
)


def make_task(seed: int, tokens: int) -> TaskStatistics:
    random = np.random.Generator(np.random.PCG64(seed))
    windows = [
        Window(line=line, start=0, ids=[seed] * min(10, tokens - at), digest=100 * seed + line)
        for line, at in enumerate(range(0, tokens, 10), start=1)
    ]
    sample = TokenSample.of(windows)
    source = Source(sha256=f"{seed}", lines=9, tokens=tokens, sequence_length=10, sample=sample)
    return TaskStatistics(
        sources=(source,),
        layers={
            layer.layer: LayerSums.of_tokens(
                random.normal(size=(tokens, layer.num_experts)),
                random.random((tokens, 2)),
                np.argsort(random.random((tokens, layer.num_experts)))[:, :2],
                random.random((tokens, 2)),
            )
            for layer in SHAPE.layers
        },
    )


STATISTICS = Statistics(
    checkpoint_sha256="c", shape=SHAPE, tasks={"a": make_task(1, 40), "b": make_task(2, 200)}
)


def test_one_task_is_itself() -> None:
    mixture = mix(STATISTICS, {"b": 0.3})
    assert mixture.measured is STATISTICS.task("b")
    assert mixture.windows == STATISTICS.task("b").windows
    assert mixture.digests == set(range(201, 221))


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_sums_are_those_of_tokens_that_count_by_their_share(one: float, two: float) -> None:
    mixture = mix(STATISTICS, {"a": one, "b": two})
    share = one / (one + two)
    for layer in SHAPE.layers:
        for name in SUM_NAMES:
            a, b = (
                getattr(STATISTICS.task(task).layers[layer.layer], name) / tokens
                for task, tokens in (("a", 40), ("b", 200))
            )
            found = getattr(mixture.measured.layers[layer.layer], name)
            np.testing.assert_allclose(found, 240 * (share * a + (1 - share) * b), rtol=1e-9)
    counts = [sum(len(w.ids) for w in mixture.windows if w.ids[0] == task) for task in (1, 2)]
    # One of the two gives all that it has, the other its share, in whole tokens.
    assert counts[0] == 40 or counts[1] == 200
    assert counts[0] == pytest.approx(share * sum(counts), abs=1.5)
    assert mixture.digests == {*range(101, 105), *range(201, 221)}


def test_unmeasured_tasks_and_bad_weights_are_refused() -> None:
    with pytest.raises(StatisticsError, match="one of \\['a', 'b'\\]"):
        mix(STATISTICS, {"a": 1, "x": 1})
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(StatisticsError, match=r"weight must be in \(0, inf\)"):
            mix(STATISTICS, {"a": weight, "b": 1})
    empty = replace(make_task(3, 10), sources=())
    with pytest.raises(StatisticsError, match=r"must cover a token .* none of 'e'"):
        mix(replace(STATISTICS, tasks={**STATISTICS.tasks, "e": empty}), {"e": 1, "a": 1})


@given(st.lists(st.integers(1, 40), min_size=1, max_size=30), st.integers(1, 300))
def test_tokens_are_taken_from_all_over(lengths: list[int], tokens: int) -> None:
    windows = [
        Window(line=line, start=0, ids=[line] * length, digest=line)
        for line, length in enumerate(lengths, start=1)
    ]
    chosen = spread_windows(windows, tokens)
    assert sum(len(window.ids) for window in chosen) == min(tokens, sum(lengths))
    lines = [window.line for window in chosen]
    assert lines == sorted(set(lines))
    assert all(set(window.ids) == {window.line} for window in chosen)
    # All but one are whole, and no stretch of lines is left out that could hold two windows.
    assert sum(len(w.ids) < lengths[w.line - 1] for w in chosen) <= 1
    if len(chosen) > 1:
        gaps = [b - a for a, b in zip([0, *lines], [*lines, len(lengths) + 1], strict=True)]
        assert max(gaps) <= 4 * len(lengths) / len(chosen) + 2
