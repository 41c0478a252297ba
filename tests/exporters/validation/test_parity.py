"""The comparison of a written graph with eager: a bigram model with a cache stands for one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from edgemoe.errors import ExportError, ParityError
from edgemoe.evaluate.scorer import Request
from edgemoe_exporters.sources.eager_run import EagerRun, run_eager
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_exporters.validation.graph_scorer import GraphScorer
from edgemoe_exporters.validation.parity import Parity, check_parity, measure_parity

if TYPE_CHECKING:
    from pathlib import Path

Array = np.ndarray[Any, Any]
VOCABULARY = 11
TABLE = np.random.default_rng(0).standard_normal((VOCABULARY, VOCABULARY)).astype(np.float32)


def write_graph(path: Path, table: Array = TABLE) -> Path:
    """Logits = table[id] + number of tokens seen, counted through the cache."""
    batch, new, past = "batch", "sequence", "past"

    def value(name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
        return ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))

    def constant(name: str, array: Array) -> ir.Value:
        return ir.Value(name=name, const_value=ir.tensor(array, name=name))

    inputs = [
        value("input_ids", ir.DataType.INT64, [batch, new]),
        value("attention_mask", ir.DataType.INT64, [batch, "total"]),
        value("position_ids", ir.DataType.INT64, [batch, new]),
        value("past_key_values.0.key", ir.DataType.FLOAT, [batch, 1, past, 1]),
        value("k_cap", ir.DataType.INT64, [1]),
    ]
    weights = constant("table", table)
    axes = constant("axes", np.array([1, 3]))
    mine = ir.node("Unsqueeze", [inputs[2], axes])
    keys = ir.node("Cast", mine.outputs, attributes={"to": ir.DataType.FLOAT})
    present = ir.node("Concat", [inputs[3], keys.outputs[0]], attributes={"axis": 2})
    length = ir.node("Shape", present.outputs, attributes={"start": 2, "end": 3})
    seen = ir.node("Cast", length.outputs, attributes={"to": ir.DataType.FLOAT})
    rows = ir.node("Gather", [weights, inputs[0]])
    logits = ir.node("Add", [rows.outputs[0], seen.outputs[0]])
    outputs = [logits.outputs[0], present.outputs[0]]
    outputs[0].name, outputs[1].name = "logits", "present.0.key"
    outputs[0].shape = ir.Shape([batch, new, VOCABULARY])
    outputs[1].shape = ir.Shape([batch, 1, "total", 1])
    for output in outputs:
        output.type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        inputs,
        outputs,
        nodes=[mine, keys, present, length, seen, rows, logits],
        initializers=[weights, axes],
        opset_imports={"": 18},
        name="bigram",
    )
    ir.save(ir.Model(graph, ir_version=10), path)
    return path


def eager() -> Any:
    def call(input_ids: torch.Tensor, use_cache: bool, logits_to_keep: int) -> SimpleNamespace:
        assert use_cache is False
        assert logits_to_keep == 0
        return SimpleNamespace(logits=torch.from_numpy(TABLE)[input_ids])

    return SimpleNamespace(
        model=call, moe=SimpleNamespace(layers=[]), layers=[], is_whole=True, device="cpu"
    )


@pytest.fixture
def runs() -> list[EagerRun]:
    return run_eager(eager(), range(VOCABULARY))


def shifted(runs: list[EagerRun]) -> list[EagerRun]:
    """Add what the graph adds: the tokens seen at the end of each call."""
    for run in runs:
        seen = np.repeat(np.cumsum(run.steps), run.steps).astype(np.float32)
        run.logits[:] += seen[None, :, None]
    return runs


def test_same_model_has_no_difference(tmp_path: Path, runs: list[EagerRun]) -> None:
    parity = measure_parity(GraphRunner(write_graph(tmp_path / "g.onnx")), shifted(runs), [2])
    assert parity.max_abs_logit_difference < 1e-6
    assert abs(parity.mean_kl) < 1e-9
    assert parity.top1_agreement == 1.0
    assert parity.tokens == 20 + 12 + 2 * 9
    check_parity(parity, "fp32", "t")


def test_rows_are_continued_through_the_cache(tmp_path: Path) -> None:
    runner = GraphRunner(write_graph(tmp_path / "g.onnx"))
    runner.start(1, [1])
    first = runner.run(np.array([[3, 4]]))
    second = runner.run(np.array([[5]]))
    np.testing.assert_allclose(first[0], TABLE[[3, 4]] + 2, atol=1e-6)
    np.testing.assert_allclose(second[0], TABLE[[5]] + 3, atol=1e-6)


def test_other_weights_are_refused_with_numbers(tmp_path: Path, runs: list[EagerRun]) -> None:
    path = write_graph(tmp_path / "g.onnx", table=TABLE[::-1].copy() * 4)
    parity = measure_parity(GraphRunner(path), shifted(runs), [2])
    for precision in ("fp32", "fp16", "int8", "int4"):
        with pytest.raises(ParityError, match=r"task t in .* must be at most .*, got "):
            check_parity(parity, precision, "t")


def test_tokens_behind_a_near_tie_count_in_the_means_only(
    tmp_path: Path, runs: list[EagerRun]
) -> None:
    expected = shifted(runs)
    expected[0].logits[0, 9:, 0] += 0.5
    runner = GraphRunner(write_graph(tmp_path / "g.onnx"))
    with pytest.raises(ParityError, match="largest logit difference"):
        check_parity(measure_parity(runner, expected, [2]), "fp32", "t")
    expected[0].decided[0, 9:] = False
    parity = measure_parity(runner, expected, [2])
    assert parity.max_abs_logit_difference < 1e-6
    assert parity.near_ties == 11
    assert parity.mean_kl > 0
    with pytest.raises(ParityError, match="mean KL"):
        check_parity(replace(parity, steady_kl=0.02), "fp32", "t")


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_not_a_number_is_refused(tmp_path: Path, runs: list[EagerRun], precision: str) -> None:
    path = write_graph(tmp_path / "g.onnx", table=np.full_like(TABLE, np.nan))
    parity = measure_parity(GraphRunner(path), runs, [2])
    with pytest.raises(ParityError, match="nan"):
        check_parity(parity, precision, "t")


def test_fp32_bound_grows_with_the_logits() -> None:
    parity = Parity(
        max_abs_logit_difference=9e-4,
        max_abs_logit=10.0,
        mean_kl=0.0,
        steady_kl=0.0,
        top1_agreement=1.0,
        tokens=9,
    )
    check_parity(parity, "fp32", "t")
    with pytest.raises(ParityError):
        check_parity(replace(parity, max_abs_logit=0.5), "fp32", "t")


@pytest.mark.parametrize("context", [(1,), (1, 7), (4, 1, 7)])
def test_scorer_gives_log_probabilities_of_what_follows(
    tmp_path: Path, context: tuple[int, ...]
) -> None:
    scorer = GraphScorer(GraphRunner(write_graph(tmp_path / "g.onnx")), [1], max_length=99)
    table = torch.from_numpy(TABLE).double().log_softmax(-1).numpy()
    requests = [Request(context, ((2, 9), (3,))), Request(context, ((2, 9),))]
    scored = scorer.score(requests)
    assert [len(answers) for answers in scored] == [2, 1]
    for request, answers in zip(requests, scored, strict=True):
        for continuation, answer in zip(request.continuations, answers, strict=True):
            before = (request.context[-1], *continuation[:-1])
            np.testing.assert_allclose(answer, table[before, continuation], atol=1e-6)


def test_graph_that_cannot_be_opened_or_run_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "broken.onnx").write_bytes(b"not a graph")
    with pytest.raises(ExportError, match="must open the graph"):
        GraphRunner(tmp_path / "broken.onnx")
    runner = GraphRunner(write_graph(tmp_path / "g.onnx"))
    runner.start(1, [1])
    with pytest.raises(ExportError, match=r"must run g\.onnx"):
        runner.run(np.array([[VOCABULARY]]))


def test_where_all_tokens_are_behind_ties_all_are_compared(
    tmp_path: Path, runs: list[EagerRun]
) -> None:
    path = write_graph(tmp_path / "g.onnx", table=TABLE[::-1].copy())
    for run in runs:
        run.decided[:] = False
    assert measure_parity(GraphRunner(path), runs, [2]).max_abs_logit_difference > 0.1


def test_tokens_whose_gates_may_jump_are_not_judged_while_a_quarter_is_left(
    tmp_path: Path, runs: list[EagerRun]
) -> None:
    expected = shifted(runs)
    runner = GraphRunner(write_graph(tmp_path / "g.onnx"))
    expected[0].logits[0, 9:, 0] += 9
    with pytest.raises(ParityError, match="mean KL"):
        check_parity(measure_parity(runner, expected, [2]), "fp16", "t")
    expected[0].steady[0, 9:] = False
    parity = measure_parity(runner, expected, [2])
    assert parity.steady_kl < 1e-9 < parity.mean_kl
    check_parity(parity, "fp16", "t")
    # A graph that is wrong elsewhere too fails as before, and so does one where few are left.
    expected[1].logits[0, :, 0] += 9
    with pytest.raises(ParityError, match="mean KL"):
        check_parity(measure_parity(runner, expected, [2]), "fp16", "t")
    for run in expected:
        run.steady[:, 1:] = False
    expected[1].steady[:] = False
    with pytest.raises(ParityError, match="mean KL"):
        check_parity(measure_parity(runner, expected, [2]), "fp16", "t")
