"""Engines built by the real TensorRT-RTX builder, which needs no GPU; none is run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from edgemoe.errors import CompileError, MissingDependencyError
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.models import read_shape
from edgemoe.plans.keep_all import keep_all
from edgemoe_exporters.compiler.api import TensorrtApi
from edgemoe_exporters.compiler.builder import BuilderFlags, build_engine
from edgemoe_exporters.compiler.compile import compile_bundle
from edgemoe_exporters.compiler.targets import Machine
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_runtime.bundle.cache_spec import CacheState
from edgemoe_runtime.bundle.engine_cache import EngineKey, find_engine
from edgemoe_runtime.bundle.integrity import verify_bundle
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest
from edgemoe_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from pathlib import Path

tensorrt_rtx = pytest.importorskip("tensorrt_rtx")

API = TensorrtApi("tensorrt_rtx", tensorrt_rtx)
BARE = Machine(jetson_target=None, compute_capability=None)
ORIN = Machine(jetson_target="jetson-orin", compute_capability=87)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Glm4MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        max_position_embeddings=128,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("checkpoint") / "tiny"
    Glm4MoeForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(scope="module")
def bundle(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("rtx") / "tiny"
    request = ExportRequest(
        model=checkpoint, output=output, target="tensorrt-rtx", precision="fp16"
    )
    return export_bundle(request).output


def test_engine_is_built_once_and_found_by_the_runtime(bundle: Path) -> None:
    (built,) = compile_bundle(bundle, "tensorrt-rtx", compute_capabilities=[86], machine=BARE)
    assert not built.cached
    assert built.reason == "there is none yet"
    version = tensorrt_rtx.__version__
    assert built.path.name == f"model__fp16__trt{version}__sm86.engine"
    manifest = load_manifest(bundle)
    found = find_engine(
        bundle,
        manifest,
        "model",
        package="tensorrt_rtx",
        package_version=version,
        compute_capabilities=[86],
    )
    assert found.path == built.path, found.reason
    assert found.key is not None
    assert found.key.shapes["past_key_values.0.key"][0] == (1, 2, 0, 16)
    assert found.key.shapes["attention_mask"][2] == (1, 128)
    verify_bundle(bundle)
    before = built.path.stat().st_mtime_ns
    (again,) = compile_bundle(bundle, "tensorrt-rtx", compute_capabilities=[86], machine=BARE)
    assert again.cached
    assert again.path.stat().st_mtime_ns == before


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_an_engine_is_built_whose_tokens_choose_their_number_of_experts(
    checkpoint: Path, tmp_path: Path, precision: str
) -> None:
    rule = KRule(slots=3, top_p=0.5, allocator=torch.randn(3, 65).numpy())
    policy = KPolicy(name="by hand", layers=(0,), rules=(rule,))
    replace(keep_all(read_shape(checkpoint)), k_policy=policy).save(tmp_path / "plan.json")
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path / "bundle",
        target="tensorrt-rtx",
        precision=precision,
        plans={"model": tmp_path / "plan.json"},
    )
    output = export_bundle(request).output
    (built,) = compile_bundle(output, "tensorrt-rtx", compute_capabilities=[86], machine=BARE)
    assert built.path.stat().st_size > 10_000
    graph = onnx.load(output / "model.onnx", load_external_data=False).graph
    assert "experts_used" in [value.name for value in graph.output]


def test_shapes_follow_the_caps_but_where_none_may(
    checkpoint: Path, bundle: Path, tmp_path: Path
) -> None:
    request = ExportRequest(
        model=checkpoint,
        output=tmp_path / "static",
        target="tensorrt-rtx",
        precision="fp16",
        static_shapes=True,
    )
    static = export_bundle(request).output
    for path, values in ((bundle, ((1,), (2,), (2,))), (static, None)):
        (built,) = compile_bundle(path, "tensorrt-rtx", compute_capabilities=[86], machine=BARE)
        shapes = EngineKey.load(built.path.with_suffix(".json")).shapes
        assert shapes.get("k_cap") == values
        assert ("k_cap:1" in built.script.read_text()) == bool(values)
        told = [spec.name for spec in load_manifest(path).inputs if spec.sets_shapes]
        assert told == (["k_cap"] if values else [])


def test_command_by_hand_is_a_script(bundle: Path) -> None:
    (built,) = compile_bundle(bundle, "tensorrt-rtx", compute_capabilities=[86], machine=BARE)
    script = built.script.read_text()
    assert built.command in script
    assert os.access(built.script, os.X_OK)
    subprocess.run(["sh", "-n", built.script], check=True)
    for option in (
        "tensorrt_rtx",
        "--onnx=model.onnx",
        f"--saveEngine=engines/{built.path.name}",
        "--computeCapabilities=86",
        "--noTF32",
        "--maxShapes=input_ids:1x128,attention_mask:1x128,",
    ):
        assert option in script


def test_stale_and_damaged_engines_are_built_again(bundle: Path) -> None:
    def compile_again(max_sequence: int = 8) -> str:
        (engine,) = compile_bundle(
            bundle,
            "tensorrt-rtx",
            compute_capabilities=[120],
            max_sequence=max_sequence,
            machine=BARE,
        )
        return engine.reason

    assert compile_again() == "there is none yet"
    engine = next((bundle / "engines").glob("*sm120.engine"))
    content = engine.read_bytes()
    engine.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert compile_again() == "it is damaged"
    engine.with_suffix(".json").write_text("{")
    assert compile_again().startswith("its key cannot be read")
    assert compile_again(max_sequence=16) == "it was built from another range of shapes"
    assert compile_again(max_sequence=16) == ""
    assert EngineKey.load(engine.with_suffix(".json")).engine_size == engine.stat().st_size
    assert not list((bundle / "engines").glob(".*"))


@pytest.mark.slow
def test_every_gpu_of_the_target_is_built_for_without_one(bundle: Path) -> None:
    engines = compile_bundle(bundle, "tensorrt-rtx", machine=BARE)
    built = [engine.compute_capability for engine in engines]
    assert built == [75, 80, 86, 89, 120, 121]
    assert len({engine.path.read_bytes() for engine in engines}) == len(engines)


def test_float32_leaves_turing_out_unless_it_is_asked_for(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def note(*arguments: Any, **_: object) -> None:
        asked.append(arguments[4])

    monkeypatch.setattr("edgemoe_exporters.compiler.compile._compile", note)
    copy = copy_of(bundle, tmp_path)
    save_manifest(replace(load_manifest(copy), precision="fp32"), copy)
    compile_bundle(copy, "tensorrt-rtx", machine=BARE)
    compile_bundle(copy, "tensorrt-rtx", compute_capabilities=[75], machine=BARE)
    assert asked == [80, 86, 89, 120, 121, 75]


def test_a_bundle_for_another_target_is_refused(bundle: Path) -> None:
    with pytest.raises(CompileError, match=r"which is tensorrt-rtx, got jetson-orin: .* Give"):
        compile_bundle(bundle, "jetson-orin", machine=ORIN)


def test_jetson_engines_are_refused_elsewhere_with_what_to_run_there(
    bundle: Path, tmp_path: Path
) -> None:
    orin = for_target(bundle, "jetson-orin", tmp_path / "orin")
    with pytest.raises(CompileError, match="must be compiled on the Jetson Orin") as refusal:
        compile_bundle(orin, "jetson-orin", machine=BARE)
    message = str(refusal.value)
    assert "edgemoe compile tiny --target jetson-orin --task model" in message
    assert "trtexec" in message
    assert "--stronglyTyped" in message
    assert "--minShapes=input_ids:1x1," in message
    with pytest.raises(CompileError, match="Jetson Thor"):
        compile_bundle(
            for_target(bundle, "jetson-thor", tmp_path / "thor"), "jetson-thor", machine=ORIN
        )


@pytest.mark.parametrize(
    ("target", "machine", "asked", "message"),
    [
        ("tensorrt", BARE, None, "no CUDA GPU was found.*--target tensorrt-rtx"),
        ("tensorrt-rtx", BARE, [86, 87], "must be among 75, 80, 86, 89, 120, 121, got 87"),
        ("cpu", BARE, None, "runs in onnxruntime as exported"),
        ("orin", BARE, None, "target must be one of tensorrt-rtx, tensorrt, jetson-orin"),
    ],
)
def test_what_cannot_be_built_is_refused(
    bundle: Path,
    tmp_path: Path,
    target: str,
    machine: Machine,
    asked: list[int] | None,
    message: str,
) -> None:
    if target == "tensorrt":
        bundle = for_target(bundle, target, tmp_path)
    with pytest.raises(CompileError, match=message):
        compile_bundle(bundle, target, compute_capabilities=asked, machine=machine)


def test_limits_beyond_the_model_are_refused(bundle: Path) -> None:
    with pytest.raises(CompileError, match="at most the model's 128 positions, got 129"):
        compile_bundle(bundle, "tensorrt-rtx", max_length=129, machine=BARE)
    with pytest.raises(CompileError, match="max_sequence must be at most max_length 16"):
        compile_bundle(bundle, "tensorrt-rtx", max_length=16, max_sequence=17, machine=BARE)


def test_missing_package_says_where_it_comes_from(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    orin = for_target(bundle, "jetson-orin", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match="comes with JetPack"):
        compile_bundle(orin, "jetson-orin", machine=ORIN)


def test_graph_for_onnxruntime_is_refused(bundle: Path, tmp_path: Path) -> None:
    copy = copy_of(bundle, tmp_path)
    save_manifest(replace(load_manifest(copy), flavour="ort"), copy)
    with pytest.raises(CompileError, match=r"flavour ort .*--target tensorrt-rtx"):
        compile_bundle(copy, "tensorrt-rtx", machine=BARE)


def test_what_the_builder_would_not_end_with_is_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = load_manifest(bundle)
    states = (CacheState(name="0.compressor", dtype="float32", shape=(None, 8)),)
    made = replace(manifest, kv_cache=replace(manifest.kv_cache, states=states))
    monkeypatch.setattr("edgemoe_exporters.compiler.compile.load_manifest", lambda _: made)
    with pytest.raises(CompileError, match=r"compress windows.* 0\.compressor.*--target cuda"):
        compile_bundle(bundle, "tensorrt-rtx", machine=BARE)


def test_altered_weights_never_reach_the_parser(bundle: Path, tmp_path: Path) -> None:
    copy = copy_of(bundle, tmp_path)
    weights = copy / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="altered"):
        compile_bundle(copy, "tensorrt-rtx", machine=BARE)
    assert not (copy / "engines").exists()


def test_parser_errors_are_shown(tmp_path: Path) -> None:
    graph = save_graph(tmp_path, "NonZero", ["x"], onnx.TensorProto.INT64)
    with pytest.raises(
        CompileError, match=r"cannot parse graph.onnx: node culprit \(NonZero\)"
    ):
        build_engine(API, graph, 86, {}, BuilderFlags())


def test_float32_for_turing_is_refused_with_a_remedy(tmp_path: Path) -> None:
    graph = save_graph(tmp_path, "MatMul", ["x", "x"], onnx.TensorProto.FLOAT)
    with pytest.raises(CompileError, match=r"graph.onnx for SM75.*--precision fp16"):
        build_engine(API, graph, 75, {}, BuilderFlags())


def copy_of(bundle: Path, folder: Path) -> Path:
    return shutil.copytree(bundle, folder / "copy", ignore=shutil.ignore_patterns("engines"))


def for_target(bundle: Path, target: str, folder: Path) -> Path:
    """Return a copy of a bundle that says another target."""
    copy = shutil.copytree(bundle, folder / "tiny", ignore=shutil.ignore_patterns("engines"))
    save_manifest(replace(load_manifest(copy), target=target), copy)
    return copy


def save_graph(folder: Path, op: str, inputs: list[str], output: int) -> Path:
    node = onnx.helper.make_node(op, inputs, ["y"], name="culprit")
    ends = [
        onnx.helper.make_tensor_value_info(name, kind, shape)
        for name, kind, shape in (
            ("x", onnx.TensorProto.FLOAT, [64, 64]),
            ("y", output, [64 if op == "MatMul" else 2, None]),
        )
    ]
    graph = onnx.helper.make_graph([node], "graph", ends[:1], ends[1:])
    path = folder / "graph.onnx"
    opset = onnx.helper.make_opsetid("", 20)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return path


def test_compiler_needs_no_torch() -> None:
    code = (
        "import sys, edgemoe_exporters.compiler.compile\n"
        "print(sorted({'torch', 'transformers', 'onnx', 'onnx_ir'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert result.stdout.strip() == "[]"
