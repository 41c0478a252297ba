"""A graph in slices answers as the whole graph does, bit by bit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgemoe.errors import ExportError
from edgemoe.evaluate.scorer import Request
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.validation.graph_calls import Call, Runner, count_tokens, last_uses
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_exporters.validation.graph_scorer import GraphScorer
from edgemoe_exporters.validation.sliced_runner import SlicedRunner, weight_bytes

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.fused

LAYERS = 2
CALLS = [
    Call(np.array([[5, 17, 60, 33]])),
    Call(np.array([[8]]), after=0),
    Call(np.array([[9]]), after=0),
    Call(np.array([[10, 11], [1, 2]])),
    Call(np.array([[12], [4]]), after=3),
    Call(np.array([[7]]), after=1),
]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cpu:fp32", marks=pytest.mark.slow),
        "cpu:int4",
        pytest.param("jetson-orin:fp32", marks=pytest.mark.slow),
    ],
)
def graph(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    target, precision = request.param.split(":")
    output = tmp_path_factory.mktemp("graph") / "bundle"
    export_bundle(
        ExportRequest(model=checkpoint, output=output, target=target, precision=precision)
    )
    return output / "model.onnx"


def answers(runner: Runner) -> list[Any]:
    got: list[Any] = []
    runner.run_calls(CALLS, [2] * LAYERS, lambda number, logits: got.append((number, logits)))
    assert [number for number, _ in got] == list(range(len(CALLS)))
    return [logits for _, logits in got]


@pytest.mark.parametrize("parts", [1, 4, 1000])
def test_slices_answer_as_the_whole(graph: Path, parts: int) -> None:
    budget = weight_bytes(graph) // parts
    sliced = SlicedRunner(graph, budget)
    # More than the layers and the head: there is a place to cut after attention, too.
    assert sliced.slice_count >= (1 if parts == 1 else LAYERS + 1)
    assert sliced.slices[0].start == 0
    for one, after in zip(sliced.slices, sliced.slices[1:], strict=False):
        assert one.stop == after.start
    for got, want in zip(answers(sliced), answers(GraphRunner(graph)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


def test_slices_keep_to_their_budget_where_they_can(graph: Path) -> None:
    budget = weight_bytes(graph) // 3
    sizes = [one.weight_bytes for one in SlicedRunner(graph, budget).slices]
    smallest = [one.weight_bytes for one in SlicedRunner(graph, 0).slices]
    assert all(size <= max(budget, *smallest) for size in sizes)


def test_scores_in_slices(graph: Path) -> None:
    requests = [Request((1, 2, 3), ((4, 5), (6,))), Request((9,), ((7, 8, 9),))]
    scores = [
        GraphScorer(runner, [2] * LAYERS, 64).score(requests)
        for runner in (GraphRunner(graph), SlicedRunner(graph, 0))
    ]
    for whole, sliced in zip(*scores, strict=True):
        for one, other in zip(whole, sliced, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def test_a_slice_that_cannot_run_is_one_clear_error(graph: Path) -> None:
    runner = SlicedRunner(graph, 0)
    # A batch of two rows cannot go on from one of one row.
    calls = [CALLS[0], Call(np.array([[1], [2]]), after=0)]
    with pytest.raises(ExportError, match="in slices"):
        runner.run_calls(calls, [2] * LAYERS, lambda *_: None)


def test_calls_know_their_length_and_who_goes_on() -> None:
    assert count_tokens(CALLS) == [4, 5, 5, 2, 3, 6]
    assert last_uses(CALLS) == {0: 2, 3: 4, 1: 5}
