"""Experts between shared bases in graphs: the same ops as before, at a smaller hidden size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch

from edgemoe.decompose.shared_basis import share_basis
from edgemoe.errors import ExportError
from edgemoe.models import limit_k, load_model, save_model
from edgemoe.models.layers.shared_basis import to_shared_basis
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_exporters.tracing.prepare.model import check_exportable
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_runtime import Session

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.fused

HIDDEN = 128
RANKS = (32, 96)
# Transposed, interleaved and biased; with shared experts; with groups. Plain ones are in
# test_lower_ort.py.
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt_oss": {"layer_types": ["full_attention", "sliding_attention"]},
    "glm4_moe": {"first_k_dense_replace": 0},
    "deepseek_v3": {"first_k_dense_replace": 0},
}


@pytest.fixture(scope="module")
def based(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a family and ranks to a checkpoint with two layers between bases."""
    made: dict[tuple[str, tuple[int, ...]], Path] = {}

    def get(family: str, ranks: tuple[int, ...] = RANKS) -> Path:
        if (family, ranks) not in made:
            folder = tmp_path_factory.mktemp(family)
            changes = {"num_hidden_layers": 2, "hidden_size": HIDDEN, **FAMILIES[family]}
            model = load_model(write_tiny_checkpoint(family, folder / "whole", **changes))
            for layer, rank in zip(model.layers, ranks, strict=True):
                to_shared_basis(layer, share_basis(layer, rank).tensors)
            (folder / "based").mkdir()
            save_model(model, folder / "based", source=folder / "whole")
            made[family, ranks] = folder / "based"
        return made[family, ranks]

    return get


def run(path: Path, output: Path, target: str, precision: str, **options: Any) -> Any:
    request = ExportRequest(
        model=path, output=output, target=target, precision=precision, **options
    )
    return export_bundle(request)


def shapes_of_ops(path: Path, name: str) -> list[tuple[int, ...]]:
    """Shapes of the first initializer with three axes, or two, that each such op reads."""
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
def test_fp32_graphs_agree_with_eager_at_every_cap(
    family: str, based: Callable[..., Path], tmp_path: Path
) -> None:
    path = based(family, (20, 96))
    for target in ("cpu", "tensorrt-rtx"):
        (task,) = run(path, tmp_path / target, target, "fp32").tasks.values()
        allowed = 1e-4 * max(1.0, task.parity.max_abs_logit)
        assert 0 < task.parity.max_abs_logit_difference < allowed
    # The fused op is the family's own, at the rank of its layer.
    assert [shape[-1] for shape in shapes_of_ops(tmp_path / "cpu/model.onnx", "MoE")] == [
        20,
        96,
    ]

    model = load_model(path)
    ids = torch.randint(3, 96, (1, 9), generator=torch.Generator().manual_seed(3))
    for target in ("cpu", "tensorrt-rtx"):
        runner = GraphRunner(tmp_path / target / "model.onnx")
        for cap in (1, 2):
            with torch.no_grad(), limit_k(model, cap):
                expected = model.model(input_ids=ids, use_cache=False).logits
            runner.start(1, [cap] * 2)
            found = torch.from_numpy(runner.run(ids.numpy()))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize(
    ("family", "precision"),
    [
        pytest.param("gpt_oss", "fp16", marks=pytest.mark.slow),
        ("gpt_oss", "int4"),
        pytest.param("glm4_moe", "int8", marks=pytest.mark.slow),
    ],
)
def test_narrow_graphs_run_the_fused_op_at_the_rank(
    family: str, precision: str, based: Callable[..., Path], tmp_path: Path
) -> None:
    report = run(based(family), tmp_path / "bundle", "cpu", precision)

    (task,) = report.tasks.values()
    assert task.parity.mean_kl < {"fp16": 1e-4, "int8": 0.1, "int4": 0.3}[precision]
    graph = tmp_path / "bundle" / "model.onnx"
    if precision == "fp16":
        assert [shape[-1] for shape in shapes_of_ops(graph, "MoE")] == list(RANKS)
    else:
        bits = int(precision.removeprefix("int"))
        packed = [rank * bits // 8 for rank in RANKS]
        assert [shape[-1] for shape in shapes_of_ops(graph, "QMoE")] == packed
        for node in onnx.load(graph, load_external_data=False).graph.node:
            if any("_basis" in value for value in node.input):
                attributes = {part.name: part.i for part in node.attribute}
                assert (node.op_type, attributes["bits"]) == ("MatMulNBits", bits)
    with Session.open(tmp_path / "bundle") as session:
        assert len(session.generate("w5 w17 w60", max_new_tokens=3).tokens) <= 3


PLANS: dict[str, tuple[list[tuple[int, ...]], ...]] = {
    "a": ([(0,), (2,), (3, 5), (7,)], [(1,), (4,), (6,)]),
    "b": ([(1,), (2,), (3, 5)], [(4,), (6,), (7,)]),
}


def write_plans(folder: Path) -> dict[str, Path]:
    paths = {}
    for name, layers in PLANS.items():
        plan = Plan(
            method="by hand",
            layers=tuple(
                LayerPlan(
                    layer=index,
                    experts=tuple(MergedExpert(members=members) for members in experts),
                )
                for index, experts in enumerate(layers)
            ),
        )
        paths[name] = folder / f"{name}.json"
        plan.save(paths[name])
    return paths


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "target", "precision"),
    [("gpt_oss", "cpu", "int4"), ("glm4_moe", "jetson-orin", "fp16")],
)
def test_tasks_store_their_bases_once_also_when_streamed(
    family: str, target: str, precision: str, based: Callable[..., Path], tmp_path: Path
) -> None:
    plans = write_plans(tmp_path)
    path = based(family)
    for name, limit in (("whole", None), ("streamed", 0)):
        output = tmp_path / name
        report = run(path, output, target, precision, plans=plans, memory_limit_bytes=limit)
        assert report.streamed == (name == "streamed")
        assert report.separate_stacks == ()
    for file in (tmp_path / "whole").iterdir():
        if file.name != "manifest.json":
            assert file.read_bytes() == (tmp_path / "streamed" / file.name).read_bytes()
    locations = []
    for name in PLANS:
        graph = onnx.load(tmp_path / "whole" / f"{name}.onnx", load_external_data=False).graph
        locations.append(
            {
                tensor.name: {entry.key: entry.value for entry in tensor.external_data}
                for tensor in graph.initializer
                if "_basis" in tensor.name and tensor.external_data
            }
        )
    # Few scales lie in the graph itself.
    names = {name.removesuffix(".quantised") for name in locations[0]}
    assert sum(name.endswith("_basis") for name in names) == 4
    assert locations[0] == locations[1]
    assert {place["location"] for place in locations[0].values()} == {"shared.onnx.data"}


def test_a_rank_that_blocks_do_not_divide_is_refused_without_weights(
    based: Callable[..., Path], tmp_path: Path
) -> None:
    path = based("glm4_moe", (20, 96))
    check_exportable(path, "fp16")
    for precision in ("int4", "int8"):
        with pytest.raises(ExportError, match=rf"multiple of 32 .* {precision}, got 20"):
            run(path, tmp_path / "out", "cpu", precision)
    assert not (tmp_path / "out").exists()


def test_an_engine_is_built_from_it(based: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    from edgemoe_exporters.compiler.compile import compile_bundle

    run(based("gpt_oss"), tmp_path / "bundle", "tensorrt-rtx", "fp16")
    (engine,) = compile_bundle(
        tmp_path / "bundle", "tensorrt-rtx", compute_capabilities=[86], max_sequence=32
    )
    assert engine.size_bytes > 0
