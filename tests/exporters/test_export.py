"""The export pipeline, end to end, on tiny random models: output, report, refusals."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Glm4MoeForCausalLM

from edgemoe.errors import ParityError, QualityGateError, TaskFileError
from edgemoe.models.checkpoint import load_model
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe_exporters import graph_making
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.sources import in_memory as source_in_memory
from edgemoe_exporters.sources.eager_run import run_eager
from edgemoe_exporters.tracing.trace import trace
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_exporters.validation.quality_gate import split_task
from edgemoe_runtime import Session
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel
    from edgemoe_exporters.report import ExportReport

pytestmark = pytest.mark.fused

LAYERS = 2


@pytest.fixture(scope="module", autouse=True)
def one_trace() -> Iterator[None]:
    """All tests export one checkpoint, and tracing is most of an export."""
    traces: list[ir.Model] = []

    def trace_once(model: MoeModel) -> ir.Model:
        if not traces:
            traces.append(trace(model))
        return traces[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_making, "trace", trace_once)
        yield


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> ExportReport:
    output = tmp_path_factory.mktemp("whole") / "bundle"
    return export_bundle(
        ExportRequest(model=checkpoint, output=output, target="cpu", precision="fp32")
    )


def test_model_as_it_is_agrees_with_eager(whole: ExportReport, checkpoint: Path) -> None:
    assert whole.tasks["model"].parity.max_abs_logit_difference < 1e-4
    verify_bundle(whole.output)
    manifest = load_manifest(whole.output)
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= set(
        manifest.files
    )
    assert manifest.tasks["model"].experts is None
    assert manifest.tasks["model"].quality is None
    assert manifest.k_ladder[0].k_cap == (2,) * LAYERS
    assert manifest.model.checkpoint_sha256 == load_model(checkpoint).sha256
    assert manifest.size.total_bytes == sum(entry.size for entry in manifest.files.values())
    assert (manifest.model.bos_token_id, manifest.model.eos_token_ids) == (1, (2,))


def test_graph_generates_what_transformers_generates(
    whole: ExportReport, checkpoint: Path
) -> None:
    model = Glm4MoeForCausalLM.from_pretrained(checkpoint)
    prompt = torch.tensor([[5, 17, 60, 33]])
    want = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None)
    runner = GraphRunner(whole.output / "model.onnx")
    runner.start(1, [2] * LAYERS)
    ids, got = prompt.numpy(), prompt.tolist()[0]
    for _ in range(8):
        ids = runner.run(ids)[:, -1:].argmax(-1)
        got.append(int(ids[0, 0]))
    assert got == want[0].tolist()
    with Session.open(whole.output) as session:
        assert session.token_logprobs(got, 4).shape == (8,)
        assert session.generate("w5 w17 w60 w33", max_new_tokens=3).tokens == tuple(got[4:7])


@pytest.fixture(scope="module")
def pruned(
    checkpoint: Path, tasks: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> ExportReport:
    output = tmp_path_factory.mktemp("pruned") / "bundle"
    return export_bundle(
        ExportRequest(
            model=checkpoint,
            output=output,
            target="cpu",
            tasks=tasks,
            keep=0.5,
            max_drop=100.0,
            accept_large_drop=True,
            accept_weak_evidence=True,
            ladder=False,
            speed=False,
        )
    )


def test_tasks_get_their_experts_and_their_quality(
    pruned: ExportReport, tasks: dict[str, Path]
) -> None:
    manifest = load_manifest(pruned.output)
    assert (manifest.precision, manifest.flavour) == ("int4", "ort")
    # The first whose QMoE may round activations to int8.
    assert manifest.needs_onnxruntime == "1.31"
    for name, entry in manifest.tasks.items():
        assert entry.experts_per_layer == (4,) * LAYERS
        assert entry.experts is not None
        assert all(len(set(layer)) == 4 for layer in entry.experts)
        assert entry.plan is not None
        assert entry.plan["method"] == "reap"
        quality = entry.quality
        assert quality is not None
        assert quality.before is not None
        assert quality.after is not None
        assert quality.before["metric"] == quality.after["metric"] == "perplexity"
        assert quality.before["tokens"] == quality.after["tokens"]
        assert quality.passed is True
        assert quality.data is not None
        assert (quality.data.file, quality.data.lines) == (tasks[name].name, 3)


def test_tasks_share_the_union_of_their_experts(
    pruned: ExportReport, whole: ExportReport
) -> None:
    manifest = load_manifest(pruned.output)
    low, high = (manifest.tasks[name].experts for name in ("low", "high"))
    assert low is not None
    assert high is not None
    common = sum(len(set(a) & set(b)) for a, b in zip(low, high, strict=True))
    assert common  # otherwise nothing is shared, and this test shows nothing
    assert pruned.separate_stacks == ()
    assert {"low.onnx", "high.onnx", "shared.onnx.data"} <= set(manifest.files)
    stored = sum(e.size for name, e in manifest.files.items() if name.endswith(".data"))
    read = sum(
        int(entry.value)
        for name in ("low", "high")
        for entry in external_entries(pruned.output / f"{name}.onnx", "length")
    )
    assert stored < 0.75 * read
    assert pruned.size.total_bytes < whole.size.total_bytes


def external_entries(path: Path, key: str) -> list[Any]:
    import onnx

    model = onnx.load(path, load_external_data=False)
    return [
        entry
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == key
    ]


def test_same_request_gives_the_same_bytes(
    pruned: ExportReport, checkpoint: Path, tasks: dict[str, Path], tmp_path: Path
) -> None:
    again = export_bundle(
        ExportRequest(
            model=checkpoint,
            output=tmp_path / "again",
            target="cpu",
            tasks=tasks,
            keep=0.5,
            max_drop=100.0,
            accept_large_drop=True,
            accept_weak_evidence=True,
            ladder=False,
            speed=False,
        )
    )
    assert files_of(again.output) == files_of(pruned.output)


def plan_of(*layers: list[tuple[int, ...]]) -> Plan:
    return Plan(
        method="by hand",
        layers=tuple(
            LayerPlan(
                layer=index, experts=tuple(MergedExpert(members=members) for members in experts)
            )
            for index, experts in enumerate(layers)
        ),
    )


RAGGED = plan_of([(0,), (2,), (3, 5), (7,)], [(1,), (4,), (6,)])
OTHER = plan_of([(1,), (2,), (3, 5)], [(4,), (6,), (7,)])


@pytest.mark.parametrize(("target", "precision"), [("cpu", "fp32"), ("jetson-orin", "fp32")])
def test_plans_with_ragged_and_merged_layers(
    checkpoint: Path, tmp_path: Path, target: str, precision: str
) -> None:
    RAGGED.save(tmp_path / "a.json")
    OTHER.save(tmp_path / "b.json")
    report = export_bundle(
        ExportRequest(
            model=checkpoint,
            output=tmp_path / "bundle",
            target=target,
            precision=precision,
            plans={"a": tmp_path / "a.json", "b": tmp_path / "b.json"},
        )
    )
    assert all(task.parity.max_abs_logit_difference < 1e-4 for task in report.tasks.values())
    manifest = load_manifest(tmp_path / "bundle")
    assert manifest.needs_onnxruntime == ("1.28" if target == "cpu" else "1.23")
    assert manifest.tasks["a"].experts_per_layer == (4, 3)
    assert manifest.tasks["b"].experts_per_layer == (3, 3)
    for name, plan in (("a", RAGGED), ("b", OTHER)):
        listed = manifest.tasks[name].experts
        assert listed is not None
        for layer, experts in zip(plan.layers, listed, strict=True):
            members = [(e,) if isinstance(e, int) else e for e in experts]
            assert sorted(members) == sorted(expert.members for expert in layer.experts)


def test_a_task_that_keeps_all_in_another_order_says_so(
    checkpoint: Path, tmp_path: Path, tasks: dict[str, Path]
) -> None:
    """Slots that two tasks share lie side by side, so keeping all may still move experts."""
    plan_of([(2,), (3,), (5,)], [(0,), (1,)]).save(tmp_path / "few.json")
    export_bundle(
        ExportRequest(
            model=checkpoint,
            output=tmp_path / "bundle",
            target="cpu",
            precision="fp32",
            tasks={"all": tasks["low"]},
            plans={"few": tmp_path / "few.json"},
            keep=1.0,
        )
    )
    manifest = load_manifest(tmp_path / "bundle")
    listed = manifest.tasks["all"].experts
    assert listed is not None
    assert [sorted(layer) for layer in listed] == [list(range(8))] * LAYERS
    few = manifest.tasks["few"].experts
    assert few is not None
    for layer, kept in zip(listed, few, strict=True):
        assert set(layer[-len(kept) :]) == set(kept) or set(layer[: len(kept)]) == set(kept)


def test_the_trace_keeps_no_model(checkpoint: Path) -> None:
    model = load_model(checkpoint)
    reference = weakref.ref(model.model)
    trace(model)
    del model
    gc.collect()
    assert reference() is None


def test_what_cuda_cannot_run_is_told(whole: ExportReport, pruned: ExportReport) -> None:
    assert whole.notes == pruned.notes == ()
    on_cuda = replace(whole, target="cuda")
    assert "use --precision fp16" in on_cuda.notes[0]
    assert on_cuda.to_json()["notes"] == list(on_cuda.notes)
    assert replace(on_cuda, precision="fp16").notes == ()
    apart = replace(whole, separate_stacks=("high: layers.0.down",))
    assert "high: layers.0.down" in apart.notes[0]


def test_plan_is_evaluated_on_all_examples_of_its_task(
    checkpoint: Path, tmp_path: Path, tasks: dict[str, Path]
) -> None:
    RAGGED.save(tmp_path / "a.json")
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path / "bundle",
        target="cpu",
        precision="fp32",
        tasks={"low": tasks["low"]},
        plans={"low": tmp_path / "a.json"},
        max_drop=0.0,
    )
    with pytest.raises(TaskFileError, match=r"12 lines judge, fewer than 20\. Add lines"):
        export_bundle(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]
    weak = replace(request, accept_weak_evidence=True)
    with pytest.raises(QualityGateError, match=r"--max-drop 0 .* got .* 12 held-out lines"):
        export_bundle(weak)
    # Only the scores stay.
    kept = [path.name for path in (tmp_path / "bundle.kept.partial" / "kept").iterdir()]
    assert len(kept) == 2
    assert all(name.startswith("low.score.") for name in kept)


@pytest.mark.parametrize("stage", ["open the checkpoint", "verify the bundle"])
def test_interrupted_export_leaves_nothing(
    checkpoint: Path, tmp_path: Path, stage: str
) -> None:
    def interrupt(text: str) -> None:
        if text == stage:
            raise KeyboardInterrupt

    request = ExportRequest(
        model=checkpoint, output=tmp_path / "bundle", target="cpu", precision="fp32"
    )
    with pytest.raises(KeyboardInterrupt):
        export_bundle(request, on_stage=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_wrong_graph_leaves_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other_model(model: Any, ids: Any) -> Any:
        runs = run_eager(model, ids)
        for run in runs:
            run.logits[..., 5] += 1e-2
        return runs

    monkeypatch.setattr(source_in_memory, "run_eager", other_model)
    request = ExportRequest(
        model=checkpoint, output=tmp_path / "bundle", target="cpu", precision="fp32"
    )
    with pytest.raises(ParityError, match="largest logit difference must be at most"):
        export_bundle(request)
    assert list(tmp_path.iterdir()) == []


def test_split_holds_out_every_fourth_line(tasks: dict[str, Path]) -> None:
    from edgemoe.tasks import TaskFile

    calibration, held_out = split_task(TaskFile.load("low", tasks["low"]))
    assert [record.line for record in held_out.records] == [4, 8, 12]
    assert [record.line for record in calibration.records] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
