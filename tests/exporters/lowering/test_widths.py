"""Narrower experts in graphs: the same ops as before, at each layer's own width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch

from edgemoe.apply.in_memory import applied
from edgemoe.apply.streamed import apply_streamed
from edgemoe.errors import ExportError, PlanError
from edgemoe.models import limit_k, load_model, read_shape, save_model
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.channels import write_mask
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.precision import check_block_sizes
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_runtime import Session
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

pytestmark = pytest.mark.fused

# Transposed, interleaved and biased; with shared experts of the same entry; without a gate.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {
        "layer_types": ["full_attention", "sliding_attention"],
        "intermediate_size": 64,
    },
    "glm4_moe": {"first_k_dense_replace": 0, "moe_intermediate_size": 64},
    "qwen2_moe": {"moe_intermediate_size": 64},
}
COUNTS = (24, 39)
WIDTHS = [24, 40]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a family to a checkpoint of two MoE layers of 64 neurons."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            changes = {"num_hidden_layers": 2, **FAMILIES[family]}
            made[family] = write_tiny_checkpoint(family, folder / "whole", **changes)
        return made[family]

    return get


def plan_for(
    path: Path,
    experts: tuple[tuple[int, ...], ...] = (tuple(range(8)),) * 2,
    counts: tuple[int, ...] = COUNTS,
    seed: int = 0,
) -> Plan:
    """Keep drawn neurons; those of an expert are the same for the same seed."""
    shape = read_shape(path)
    layers = []
    for layer, ids, count in zip(shape.layers, experts, counts, strict=True):
        made = []
        for expert in ids:
            draw = np.random.Generator(np.random.PCG64([seed, layer.layer, expert]))
            neurons = sorted(draw.permutation(64)[:count].tolist())
            made.append(MergedExpert(members=(expert,), neurons=write_mask(neurons, 64)))
        layers.append(LayerPlan(layer=layer.layer, experts=tuple(made)))
    return Plan(method="by hand", layers=tuple(layers))


def run(path: Path, output: Path, target: str, precision: str, **options: Any) -> Any:
    request = ExportRequest(
        model=path, output=output, target=target, precision=precision, **options
    )
    return export_bundle(request)


def save_plans(folder: Path, plans: Mapping[str, Plan]) -> dict[str, Path]:
    for name, plan in plans.items():
        plan.save(folder / f"{name}.json")
    return {name: folder / f"{name}.json" for name in plans}


def first_products(path: Path, name: str) -> list[tuple[int, ...]]:
    """Shapes of the first initializer with three axes that each such op reads."""
    graph = onnx.load(path, load_external_data=False).graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if node.op_type == name:
            read = [shapes[value] for value in node.input if len(shapes.get(value, ())) == 3]
            found.append(read[0])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_fp32_graphs_of_a_ragged_checkpoint_agree_with_eager_at_every_cap(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "narrow"
    apply_streamed(checkpoint(family), plan_for(checkpoint(family)), path)
    model = load_model(path)
    assert [layer.intermediate_size for layer in model.layers] == WIDTHS
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    for target in ("cpu", "tensorrt-rtx"):
        (task,) = run(path, tmp_path / target, target, "fp32").tasks.values()
        assert task.parity.max_abs_logit_difference < 1e-4 * max(1, task.parity.max_abs_logit)
        verify_bundle(tmp_path / target)
        runner = GraphRunner(tmp_path / target / "model.onnx")
        for cap in (1, 2):
            with torch.no_grad(), limit_k(model, cap):
                expected = model.model(input_ids=ids, use_cache=False).logits
            runner.start(1, [cap] * 2)
            found = torch.from_numpy(runner.run(ids.numpy()))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
    shapes = first_products(tmp_path / "cpu/model.onnx", "MoE")
    assert [rows for _, rows, _ in shapes] == [2 * width for width in WIDTHS]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "precision"),
    [("gpt_oss", "fp16"), ("gpt_oss", "int4"), ("glm4_moe", "int8"), ("glm4_moe", "int4")],
)
def test_quantised_experts_are_padded_to_whole_blocks(
    family: str, precision: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "narrow"
    apply_streamed(checkpoint(family), plan_for(checkpoint(family)), path)

    report = run(path, tmp_path / "bundle", "cpu", precision)

    (task,) = report.tasks.values()
    assert task.parity.mean_kl < {"fp16": 1e-4, "int8": 0.1, "int4": 0.3}[precision]
    name, widths = ("MoE", WIDTHS) if precision == "fp16" else ("QMoE", [32, 64])
    shapes = first_products(tmp_path / "bundle/model.onnx", name)
    assert [rows for _, rows, _ in shapes] == [2 * width for width in widths]
    with Session.open(tmp_path / "bundle") as session:
        assert len(session.generate("w5 w17 w60", max_new_tokens=3).tokens) <= 3


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt_oss", "glm4_moe"])
def test_the_padding_of_blocks_is_that_of_a_wider_checkpoint(
    family: str, checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = tmp_path / "narrow"
    apply_streamed(checkpoint(family), plan_for(checkpoint(family)), path)
    wide = load_model(path)
    for layer in wide.layers:
        layout, size = layer.layout, layer.intermediate_size
        tensors = layer.tensors()
        for name in layout.names:
            full = f"{layer.spec.experts}.{name}"
            rows = [
                layout.keep_channels(name, one, torch.arange(size), -(-size // 32) * 32)
                for one in tensors[full]
            ]
            tensors[full] = torch.stack(rows)
        layer.replace(tensors)
    (tmp_path / "wide").mkdir()
    save_model(wide, tmp_path / "wide", source=path)

    for name in ("narrow", "wide"):
        run(tmp_path / name, tmp_path / f"{name}-bundle", "cpu", "int4")

    data = [tmp_path / f"{name}-bundle" / "model.onnx.data" for name in ("narrow", "wide")]
    assert data[0].read_bytes() == data[1].read_bytes()


def test_only_the_hidden_size_must_be_a_whole_number_of_blocks(
    checkpoint: Callable[[str], Path],
) -> None:
    check_block_sizes(read_shape(checkpoint("glm4_moe")), "int4")


SHARED = ((0, 1, 2, 5), (1, 4, 6))
OTHER = ((1, 2, 3, 5), (4, 6, 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target", "precision"),
    [("gpt_oss", "cpu", "int4"), ("glm4_moe", "jetson-orin", "fp16")],
)
def test_tasks_share_experts_with_the_same_neurons_also_when_streamed(
    family: str,
    target: str,
    precision: str,
    checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    path = checkpoint(family)
    plans = save_plans(tmp_path, {"a": plan_for(path, SHARED), "b": plan_for(path, OTHER)})
    for name, limit in (("whole", None), ("streamed", 0)):
        report = run(
            path, tmp_path / name, target, precision, plans=plans, memory_limit_bytes=limit
        )
        assert report.streamed == (name == "streamed")
    for file in (tmp_path / "whole").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()
    together = report.size.total_bytes
    alone = [
        run(path, tmp_path / f"only-{n}", target, precision, plans={n: plans[n]}) for n in plans
    ]
    assert together < sum(one.size.total_bytes for one in alone)
    others = save_plans(
        tmp_path, {"c": plan_for(path, SHARED), "d": plan_for(path, OTHER, seed=1)}
    )
    apart = run(path, tmp_path / "apart", target, precision, plans=others)
    assert apart.size.total_bytes > together


def test_tasks_of_other_widths_and_whole_ones_get_copies_of_their_own(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("glm4_moe")
    plans = {
        "a": plan_for(path),
        "b": plan_for(path, counts=(24, 16)),
        "c": plan_for(path, OTHER, counts=(64, 8)),
    }

    report = run(path, tmp_path / "bundle", "cpu", "fp32", plans=save_plans(tmp_path, plans))

    verify_bundle(tmp_path / "bundle")
    assert load_manifest(tmp_path / "bundle").tasks["a"].experts_per_layer == (8, 8)
    model = load_model(path)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    for name, plan in plans.items():
        parity = report.tasks[name].parity
        assert parity.max_abs_logit_difference < 1e-4 * max(1, parity.max_abs_logit)
        runner = GraphRunner(tmp_path / "bundle" / f"{name}.onnx")
        runner.start(1, [2, 2])
        with torch.no_grad(), applied(model, plan):
            expected = model.model(input_ids=ids, use_cache=False).logits
        found = torch.from_numpy(runner.run(ids.numpy()))
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)
        shapes = first_products(tmp_path / "bundle" / f"{name}.onnx", "MoE")
        assert [rows // 2 for _, rows, _ in shapes] == list(plan.widths(read_shape(path)))


def test_what_cannot_be_carried_out_is_refused_before_anything_is_written(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    path = checkpoint("glm4_moe")
    plans = save_plans(tmp_path, {"a": plan_for(path)})
    model = load_model(path)
    for layer in model.layers:
        factor_layer(layer, split_by_svd(layer, 4))
    (tmp_path / "factored").mkdir()
    save_model(model, tmp_path / "factored", source=path)
    for limit in (None, 0):
        with pytest.raises(PlanError, match="must have whole experts for neurons to be chosen"):
            run(
                tmp_path / "factored",
                tmp_path / "out",
                "cpu",
                "fp32",
                plans=plans,
                memory_limit_bytes=limit,
            )
        assert not (tmp_path / "out").exists()
    odd = write_tiny_checkpoint("glm4_moe", tmp_path / "odd", hidden_size=80)
    with pytest.raises(ExportError, match="hidden_size must be a multiple of 32 in int4"):
        run(odd, tmp_path / "out", "cpu", "int4")
