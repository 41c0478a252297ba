"""The whole road on tiny random models: what is written, what it says, what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from edgemoe.errors import (
    EdgemoeError,
    ExportError,
    OutputError,
    ParityError,
    PlanError,
    QualityGateError,
    TaskFileError,
)
from edgemoe.models.checkpoint import load_model
from edgemoe.prune.plan import LayerPlan, MergedExpert, Plan
from edgemoe_exporters import export
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.parity import GraphRunner, run_eager
from edgemoe_exporters.quality import split_task
from edgemoe_exporters.request import ExportReport, ExportRequest
from edgemoe_exporters.trace import trace
from edgemoe_runtime import Session
from edgemoe_runtime.integrity import verify_bundle
from edgemoe_runtime.manifest import Manifest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import onnx_ir as ir

    from edgemoe.models.contract import MoeModel

VOCABULARY = 96
LAYERS = 2
EXPERTS = 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(2)
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=EXPERTS,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=True,
        initializer_range=0.2,
    )
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    Glm4MoeForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path


def task_file(path: Path, low: int, high: int, lines: int = 12) -> Path:
    draw = np.random.default_rng(low)
    texts = [" ".join(f"w{i}" for i in draw.integers(low, high, 20)) for _ in range(lines)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tasks")
    return {
        "low": task_file(folder / "low.jsonl", 3, 40),
        "high": task_file(folder / "high.jsonl", 50, 90),
    }


@pytest.fixture(scope="module", autouse=True)
def one_trace() -> Iterator[None]:
    """All tests export one checkpoint, and tracing is most of an export."""
    traces: list[ir.Model] = []

    def trace_once(model: MoeModel) -> ir.Model:
        if not traces:
            traces.append(trace(model))
        return traces[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "trace", trace_once)
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
    manifest = Manifest.load(whole.output)
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
        )
    )


def test_tasks_get_their_experts_and_their_quality(
    pruned: ExportReport, tasks: dict[str, Path]
) -> None:
    manifest = Manifest.load(pruned.output)
    assert (manifest.precision, manifest.flavour) == ("int4", "ort")
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
    manifest = Manifest.load(pruned.output)
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
    manifest = Manifest.load(tmp_path / "bundle")
    assert manifest.tasks["a"].experts_per_layer == (4, 3)
    assert manifest.tasks["b"].experts_per_layer == (3, 3)
    for name, plan in (("a", RAGGED), ("b", OTHER)):
        listed = manifest.tasks[name].experts
        assert listed is not None
        for layer, experts in zip(plan.layers, listed, strict=True):
            members = [(e,) if isinstance(e, int) else e for e in experts]
            assert sorted(members) == sorted(expert.members for expert in layer.experts)


def test_plan_is_judged_by_all_lines_of_its_task(
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
    with pytest.raises(QualityGateError, match=r"--max-drop 0 .* got .* 12 held-out lines"):
        export_bundle(request)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]


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

    monkeypatch.setattr(export, "run_eager", other_model)
    request = ExportRequest(
        model=checkpoint, output=tmp_path / "bundle", target="cpu", precision="fp32"
    )
    with pytest.raises(ParityError, match="largest logit difference must be at most"):
        export_bundle(request)
    assert list(tmp_path.iterdir()) == []


REFUSALS: list[tuple[dict[str, Any], type[EdgemoeError], str]] = [
    ({"target": "tpu"}, ExportError, "target must be one of cpu"),
    ({"precision": "int2"}, ExportError, "precision must be one of"),
    ({"target": "jetson-orin", "precision": "int4"}, ExportError, "fp16"),
    ({"keep": 0.5}, ExportError, "keep needs a task"),
    ({"keep": 1.5}, ExportError, r"keep must be in \(0, 1\]"),
    ({"keep": 0.1, "tasks": {"low": None}}, PlanError, "top_k=2"),
    ({"max_drop": 0.1}, ExportError, "max-drop needs lines"),
    ({"max_drop": -1.0, "tasks": {"low": None}}, ExportError, "max-drop must be in"),
    ({"tasks": {"../x": None}}, ExportError, "a task's name"),
    ({"tasks": {"low": "short"}}, TaskFileError, "8 lines or more"),
    ({"tasks": {"low": "missing"}}, TaskFileError, "cannot be read"),
    ({"plans": {"low": "missing"}}, PlanError, "does not exist"),
    ({"plans": {"low": "few"}}, PlanError, "top_k=2"),
    ({"output": "exists"}, OutputError, "must not exist"),
    (
        {"output": "", "force": True, "tasks": {"low": "../outputs/exists/task"}},
        OutputError,
        "must not contain what is exported",
    ),
]


@pytest.mark.parametrize(("changes", "error", "message"), REFUSALS)
def test_refusals_come_before_the_checkpoint_is_opened(
    checkpoint: Path,
    tasks: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    error: type[EdgemoeError],
    message: str,
) -> None:
    monkeypatch.setattr(
        export, "load_model", lambda _: pytest.fail("the checkpoint was opened")
    )
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    task_file(inputs / "short", 3, 40, lines=7)
    plan_of([(0,)], [(1,), (2,)]).save(inputs / "few")
    outputs = tmp_path / "outputs"
    (outputs / "exists").mkdir(parents=True)
    task_file(outputs / "exists" / "task", 3, 40)
    given = dict(changes)
    for key in ("tasks", "plans"):
        given[key] = {
            name: tasks["low"] if value is None else inputs / value
            for name, value in given.get(key, {}).items()
        }
    given["output"] = outputs / given.get("output", "bundle")
    with pytest.raises(error, match=message):
        export_bundle(ExportRequest(**{"model": checkpoint, "target": "cpu", **given}))
    assert [path.name for path in outputs.iterdir()] == ["exists"]


def test_split_holds_out_every_fourth_line(tasks: dict[str, Path]) -> None:
    from edgemoe.tasks import TaskFile

    calibration, held_out = split_task(TaskFile.load("low", tasks["low"]))
    assert [record.line for record in held_out.records] == [4, 8, 12]
    assert [record.line for record in calibration.records] == [1, 2, 3, 5, 6, 7, 9, 10, 11]
