"""Graphs whose tokens use different numbers of experts, against the eager model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from edgemoe.allocate.usage import count_experts
from edgemoe.apply.streamed import apply_streamed
from edgemoe.calibrate.sample import Window
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.models import limit_k, load_model, read_shape
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.k_policy import following, most_slots
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.keep_all import keep_all
from edgemoe.plans.plan import Plan
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.validation.graph_calls import cache_shape
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_runtime import Session
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

KINDS = ("fixed", "top-p", "allocator", "both")
# Gates that are divided by their sum and such that are not, sigmoids with a bias, groups, and
# a sparse mixer.
CASES = (
    ("qwen3_moe", "both"),
    *(
        pytest.param(family, kind, marks=pytest.mark.slow)
        for family, kind in (
            ("qwen3_moe", "fixed"),
            ("qwen3_moe", "top-p"),
            ("qwen3_moe", "allocator"),
            ("mixtral", "both"),
            ("olmoe", "both"),
            ("glm4_moe", "top-p"),
            ("glm4_moe", "allocator"),
            ("deepseek_v3", "both"),
            ("phimoe", "both"),
        )
    ),
)

pytestmark = pytest.mark.fused


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family to a tiny random checkpoint of it."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            made[family] = tmp_path_factory.mktemp(family) / "moe"
            write_tiny_checkpoint(family, made[family], num_hidden_layers=2)
        return made[family]

    return make


def policy_for(path: Path, kind: str) -> KPolicy:
    layers = Checkpoint(path).structure.layers
    random = torch.Generator().manual_seed(2)
    rules = []
    for layer in layers:
        most = min(layer.top_k + 1, most_slots(layer))
        share = 0.55 * layer.top_k / layer.num_experts
        rows = torch.randn(most, layer.hidden_size + 1, generator=random).numpy()
        rules.append(
            KRule(
                slots=1 if kind == "fixed" else most,
                top_p={"top-p": share, "both": 1.2 * share}.get(kind),
                allocator=rows if kind in {"allocator", "both"} else None,
            )
        )
    indices = tuple(layer.index for layer in layers)
    return KPolicy(name=kind, layers=indices, rules=tuple(rules))


def plan_for(path: Path, kind: str) -> Plan:
    whole = keep_all(read_shape(path))
    return Plan(method="by hand", layers=whole.layers, k_policy=policy_for(path, kind))


def run(path: Path, output: Path, target: str, precision: str, **options: Any) -> Any:
    request = ExportRequest(
        model=path, output=output, target=target, precision=precision, **options
    )
    return export_bundle(request)


def count_in_graph(path: Path, ids: torch.Tensor, caps: list[int]) -> Any:
    """Ask a graph how many experts the tokens used, int64 [MoE layers]."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    count = ids.shape[1]
    feeds: dict[str, Any] = {
        "input_ids": ids.numpy(),
        "attention_mask": np.ones((1, count), np.int64),
        "position_ids": np.arange(count)[None],
        "k_cap": np.array(caps),
    }
    for spec in session.get_inputs():
        if spec.name not in feeds:
            feeds[spec.name] = np.zeros(cache_shape(spec.shape, 1, 0), np.float32)
    return session.run(["experts_used"], feeds)[0]


@pytest.mark.parametrize("target", ["cpu", "tensorrt-rtx"])
@pytest.mark.parametrize(("family", "kind"), CASES)
def test_fp32_graphs_agree_with_eager_at_every_cap(
    family: str, kind: str, target: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path, output = checkpoint(family), tmp_path / "bundle"
    plan = plan_for(path, kind)
    plan.save(tmp_path / "plan.json")
    plans = {"model": tmp_path / "plan.json"}
    (task,) = run(path, output, target, "fp32", plans=plans).tasks.values()
    assert task.parity.max_abs_logit_difference < 1e-4 * max(1, task.parity.max_abs_logit)
    verify_bundle(output)
    assert plan.k_policy is not None
    most = max(rule.slots for rule in plan.k_policy.rules)
    assert load_manifest(output).tasks["model"].top_k == most
    model = load_model(path)
    runner = GraphRunner(output / "model.onnx")
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    outputs = []
    for cap in (1, 2, most):
        with torch.no_grad(), following(model, plan.k_policy), limit_k(model, cap):
            expected = model.model(input_ids=ids, use_cache=False).logits
            runner.start(1, [cap] * len(model.layers))
            counts = count_experts(model, [Window(line=1, start=0, ids=ids[0].tolist())])
        found = torch.from_numpy(runner.run(ids.numpy()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
        told = count_in_graph(output / "model.onnx", ids, [cap] * len(model.layers))
        assert told.tolist() == counts.sum(axis=0).tolist()
        outputs.append(expected)
    # Otherwise the policy would not have been seen at all.
    with torch.no_grad():
        plain = model.model(input_ids=ids, use_cache=False).logits
    assert not torch.allclose(outputs[-1], plain, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_with_a_policy_gives_the_same_graph(
    kind: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    plan_for(path, kind).save(tmp_path / "plan.json")
    apply_streamed(path, plan_for(path, kind), tmp_path / "moe")
    run(path, tmp_path / "by-plan", "cpu", "fp32", plans={"model": tmp_path / "plan.json"})
    run(tmp_path / "moe", tmp_path / "by-checkpoint", "cpu", "fp32")
    run(
        tmp_path / "moe",
        tmp_path / "streamed",
        "cpu",
        "fp32",
        memory_limit_bytes=0,
    )
    ids = np.arange(3, 12)[None]
    logits = []
    for name in ("by-plan", "by-checkpoint", "streamed"):
        runner = GraphRunner(tmp_path / name / "model.onnx")
        runner.start(1, [9, 9])
        logits.append(runner.run(ids))
    assert np.array_equal(logits[0], logits[1])
    assert np.array_equal(logits[0], logits[2])


@pytest.mark.parametrize("precision", ["fp16", pytest.param("int8", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [pytest.param("top-p", marks=pytest.mark.slow), "both"])
def test_other_precisions_follow_the_policy(
    kind: str, precision: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("glm4_moe")
    plan = plan_for(path, kind)
    plan.save(tmp_path / "plan.json")
    run(path, tmp_path / "b", "cpu", precision, plans={"model": tmp_path / "plan.json"})
    runner = GraphRunner(tmp_path / "b/model.onnx")
    model = load_model(path)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    runner.start(1, [9] * len(model.layers))
    found = torch.from_numpy(runner.run(ids.numpy())).float()
    with torch.no_grad():
        plain = model.model(input_ids=ids, use_cache=False).logits
        with following(model, plan.k_policy):
            expected = model.model(input_ids=ids, use_cache=False).logits
    assert (found - expected).norm() < 0.5 * (found - plain).norm()


@pytest.fixture(scope="module")
def graphs(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, GraphRunner]:
    """Graphs of one policy, by target."""
    path, folder = checkpoint("qwen3_moe"), tmp_path_factory.mktemp("graphs")
    plan_for(path, "both").save(folder / "plan.json")
    found = {}
    for target in ("cpu", "tensorrt-rtx"):
        run(path, folder / target, target, "fp32", plans={"model": folder / "plan.json"})
        found[target] = GraphRunner(folder / target / "model.onnx", threads=1)
    return found


# Not drawn anew each time: a token at the very edge of another number may round there.
@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(3, 95), min_size=7, max_size=7), min_size=2, max_size=3),
    cut=st.integers(1, 6),
    cap=st.integers(1, 3),
)
@pytest.mark.parametrize("target", ["cpu", "tensorrt-rtx"])
def test_a_token_uses_as_many_experts_however_it_is_run(
    graphs: dict[str, GraphRunner], target: str, rows: list[list[int]], cut: int, cap: int
) -> None:
    graph = graphs[target]

    def used(*calls: list[list[int]]) -> list[list[int]]:
        """Run calls one after the other; count in each."""
        graph.start(len(calls[0]), [cap, cap])
        counts = []
        for call in calls:
            graph.run(np.array(call))
            assert graph.experts_used is not None
            counts.append(graph.experts_used.tolist())
        return counts

    alone = [used(*([[token]] for token in row)) for row in rows]
    for row, counts in zip(rows, alone, strict=True):
        # A prompt and what is generated after it; a prompt in two pieces.
        assert used([row[:cut]], *([[token]] for token in row[cut:]))[1:] == counts[cut:]
        pieces = used([row[:cut]], [row[cut:]])
        assert pieces[0] == np.sum(counts[:cut], axis=0).tolist()
        assert pieces[1] == np.sum(counts[cut:], axis=0).tolist()
    assert used(rows)[0] == np.sum(alone, axis=(0, 1)).tolist()


def test_a_session_tells_what_its_tokens_used(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("qwen3_moe")
    plan = plan_for(path, "allocator")
    assert plan.k_policy is not None
    plan.save(tmp_path / "a.json")
    keep_all(read_shape(path)).save(tmp_path / "b.json")
    plans = {name: tmp_path / f"{name}.json" for name in "ab"}
    run(path, tmp_path / "bundle", "cpu", "fp32", plans=plans)
    model = load_model(path)
    prompt = " ".join(f"w{3 + 5 * n % 90}" for n in range(30))
    for task, policy in (("a", plan.k_policy), ("b", None)):
        with Session.open(tmp_path / "bundle", task=task) as session:
            for cap in (None, 1):
                session.set_k_cap(cap)
                answer = session.generate(prompt, max_new_tokens=6)
                # The last token is made, and not run.
                ids = [*session.encode(prompt), *answer.tokens[:-1]]
                windows = [Window(line=1, start=0, ids=ids)]
                with following(model, policy), limit_k(model, cap or 9):
                    expected = float(count_experts(model, windows).mean())
                assert answer.experts_per_token == pytest.approx(expected, abs=1e-12)
                assert session.explain().experts_per_token == answer.experts_per_token
                assert answer.to_dict()["experts_per_token"] == answer.experts_per_token
                assert (answer.experts_per_token == round(expected)) == (cap == 1 or not policy)
