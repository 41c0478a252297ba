"""A tiny decoder with experts, in both cache forms, with a numpy reference of its logits."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from edgemoe_runtime.bundle.cache_spec import KvCache, KvLayer
from edgemoe_runtime.bundle.file_entry import FileEntry, SizeReport
from edgemoe_runtime.bundle.graph_spec import ModelInfo, TensorSpec
from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.bundle.manifest import Manifest
from edgemoe_runtime.bundle.manifest_file import save_manifest
from edgemoe_runtime.bundle.task_entry import TaskEntry

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM = 32, 2, 4, 2, 8
EXPERTS, TOP_K, LONGEST = 5, 3, 96
EOS, VOCABULARY = 256, 257
BuildBundle = Callable[..., Path]
Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class TinyModel:
    """Random weights, and what they compute."""

    weights: dict[str, Array]

    @classmethod
    def random(cls, seed: int) -> TinyModel:
        generator = np.random.default_rng(seed)

        def draw(*shape: int) -> Array:
            scale = 1.5 / np.sqrt(shape[0])
            values: Array = generator.standard_normal(shape).astype(np.float32) * scale
            return values.astype(np.float32)

        weights = {
            "embedding": draw(VOCABULARY, HIDDEN) * 8,
            "position": draw(LONGEST, HIDDEN) * 4,
            "head": draw(HIDDEN, VOCABULARY) * 0.15,
        }
        for layer in range(LAYERS):
            weights[f"q.{layer}"] = draw(HIDDEN, HEADS * HEAD_DIM)
            weights[f"k.{layer}"] = draw(HIDDEN, KV_HEADS * HEAD_DIM)
            weights[f"v.{layer}"] = draw(HIDDEN, KV_HEADS * HEAD_DIM)
            weights[f"o.{layer}"] = draw(HEADS * HEAD_DIM, HIDDEN)
            weights[f"router.{layer}"] = draw(HIDDEN, EXPERTS)
            weights[f"experts.{layer}"] = draw(HIDDEN, EXPERTS, HIDDEN).transpose(1, 0, 2)
        return cls(weights)

    def logits(self, ids: list[int], k_cap: tuple[int, ...] = (TOP_K,) * LAYERS) -> Array:
        """Return float64 logits [len(ids), vocabulary] of one forward pass without a cache."""
        weights = {name: value.astype(np.float64) for name, value in self.weights.items()}
        count = len(ids)
        x = weights["embedding"][ids] + weights["position"][:count]
        for layer in range(LAYERS):
            q = (x @ weights[f"q.{layer}"]).reshape(count, HEADS, HEAD_DIM)
            k = (x @ weights[f"k.{layer}"]).reshape(count, KV_HEADS, HEAD_DIM)
            v = (x @ weights[f"v.{layer}"]).reshape(count, KV_HEADS, HEAD_DIM)
            out = np.zeros_like(q)
            for head in range(HEADS):
                group = head // (HEADS // KV_HEADS)
                scores = q[:, head] @ k[:, group].T / np.sqrt(HEAD_DIM)
                scores[np.triu_indices(count, 1)] = -np.inf
                out[:, head] = _softmax(scores) @ v[:, group]
            x = x + out.reshape(count, -1) @ weights[f"o.{layer}"]
            gates = _softmax(x @ weights[f"router.{layer}"])
            order = np.argsort(-gates, axis=-1)[:, : min(TOP_K, k_cap[layer])]
            kept = np.zeros_like(gates)
            np.put_along_axis(kept, order, np.take_along_axis(gates, order, -1), -1)
            x = x + np.einsum("te,th,ehd->td", kept, x, weights[f"experts.{layer}"])
        logits: Array = x @ weights["head"]
        return logits


def _softmax(x: Array) -> Array:
    exponents = np.exp(x - x.max(axis=-1, keepdims=True))
    shares: Array = exponents / exponents.sum(axis=-1, keepdims=True)
    return shares


class _Graph:
    """Collects nodes; every call returns the name of the node's first output."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}

    def constant(self, value: object, dtype: type = np.int64) -> str:
        name = f"constant.{len(self.constants)}"
        self.constants[name] = np.array(value, dtype=dtype)
        return name

    def add(self, op: str, *inputs: str, outputs: list[str] | None = None, **more: Any) -> str:
        names = outputs or [f"{op}.{len(self.nodes)}"]
        self.nodes.append(helper.make_node(op, list(inputs), names, **more))
        return names[0]


def make_graph(model: TinyModel, form: str) -> onnx.ModelProto:
    """Build the ONNX model in the cache form `shared_buffer` or `concat`."""
    g = _Graph()
    x = g.add(
        "Add",
        g.add("Gather", "embedding", "input_ids"),
        g.add("Gather", "position", "position_ids"),
    )
    total = g.add("Gather", g.add("Shape", "attention_mask"), g.constant(1), axis=0)
    count = g.add("Gather", g.add("Shape", "input_ids"), g.constant(1), axis=0)
    for layer in range(LAYERS):
        q, k, v = (g.add("MatMul", x, f"{name}.{layer}") for name in "qkv")
        attend = _grouped_query_attention if form == "shared_buffer" else _plain_attention
        out = attend(g, layer, q, k, v, total, count)
        x = g.add("Add", x, g.add("MatMul", out, f"o.{layer}"))
        gates = g.add("Softmax", g.add("MatMul", x, f"router.{layer}"), axis=-1)
        g.add("TopK", gates, g.constant([TOP_K]), outputs=[f"top.{layer}", f"ids.{layer}"])
        cap = g.add("Gather", "k_cap", g.constant([layer]), axis=0)
        used = g.add("Cast", g.add("Less", g.constant(range(TOP_K)), cap), to=1)
        kept = g.add("Mul", f"top.{layer}", used)
        zeros = g.add("Mul", gates, g.constant(0.0, np.float32))
        spread = g.add("ScatterElements", zeros, f"ids.{layer}", kept, axis=-1)
        equation = "bte,bth,ehd->btd"
        mixed = g.add("Einsum", spread, x, f"experts.{layer}", equation=equation)
        x = g.add("Add", x, mixed)
    g.add("MatMul", x, "head", outputs=["logits"])
    tensors = {**model.weights, **g.constants}
    graph = helper.make_graph(
        g.nodes,
        "tiny",
        [_value(spec) for spec in _inputs()],
        [_value(spec) for spec in _outputs()],
        [numpy_helper.from_array(np.ascontiguousarray(v), n) for n, v in tensors.items()],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def _grouped_query_attention(
    g: _Graph, layer: int, q: str, k: str, v: str, total: str, count: str
) -> str:
    del count
    lengths = g.add("ReduceSum", "attention_mask", g.constant([1]), keepdims=0)
    last = g.add("Cast", g.add("Sub", lengths, g.constant(1)), to=TensorProto.INT32)
    whole = g.add("Cast", total, to=TensorProto.INT32)
    past = [f"past_key_values.{layer}.{kind}" for kind in ("key", "value")]
    present = [f"present.{layer}.{kind}" for kind in ("key", "value")]
    return g.add(
        "GroupQueryAttention",
        *(q, k, v, *past, last, whole),
        outputs=[f"attention.{layer}", *present],
        domain="com.microsoft",
        num_heads=HEADS,
        kv_num_heads=KV_HEADS,
    )


def _plain_attention(
    g: _Graph, layer: int, q: str, k: str, v: str, total: str, count: str
) -> str:
    def heads(x: str, number: int) -> str:
        split = g.add("Reshape", x, g.constant([0, 0, number, HEAD_DIM]))
        return g.add("Transpose", split, perm=[0, 2, 1, 3])

    full = []
    for kind, new in (("key", k), ("value", v)):
        past, present = f"past_key_values.{layer}.{kind}", f"present.{layer}.{kind}"
        g.add("Concat", past, heads(new, KV_HEADS), outputs=[present], axis=2)
        groups = np.repeat(np.arange(KV_HEADS), HEADS // KV_HEADS)
        full.append(g.add("Gather", present, g.constant(groups), axis=1))
    keys = g.add("Transpose", full[0], perm=[0, 1, 3, 2])
    scale = g.constant(1 / np.sqrt(HEAD_DIM), np.float32)
    scores = g.add("Mul", g.add("MatMul", heads(q, HEADS), keys), scale)
    zero, one = g.constant(0), g.constant(1)
    columns = g.add("Range", zero, total, one)
    rows = g.add("Unsqueeze", g.add("Range", g.add("Sub", total, count), total, one), one)
    hidden = g.add("Greater", columns, rows)
    masked = g.add("Where", hidden, g.constant(-1e9, np.float32), scores)
    out = g.add("MatMul", g.add("Softmax", masked, axis=-1), full[1])
    merged = g.add("Transpose", out, perm=[0, 2, 1, 3])
    return g.add("Reshape", merged, g.constant([0, 0, HEADS * HEAD_DIM]))


def _inputs() -> tuple[TensorSpec, ...]:
    cache = ("batch", KV_HEADS, "past", HEAD_DIM)
    return (
        TensorSpec(name="input_ids", dtype="int64", shape=("batch", "sequence")),
        TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "total")),
        TensorSpec(name="position_ids", dtype="int64", shape=("batch", "sequence")),
        *(
            TensorSpec(name=f"past_key_values.{i}.{kind}", dtype="float32", shape=cache)
            for i in range(LAYERS)
            for kind in ("key", "value")
        ),
        TensorSpec(name="k_cap", dtype="int64", shape=(LAYERS,)),
    )


def _outputs() -> tuple[TensorSpec, ...]:
    cache = ("batch", KV_HEADS, "present", HEAD_DIM)
    return (
        TensorSpec(name="logits", dtype="float32", shape=("batch", "sequence", VOCABULARY)),
        *(
            TensorSpec(name=f"present.{i}.{kind}", dtype="float32", shape=cache)
            for i in range(LAYERS)
            for kind in ("key", "value")
        ),
    )


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    dtype = {"int64": TensorProto.INT64, "float32": TensorProto.FLOAT}[spec.dtype]
    return helper.make_tensor_value_info(spec.name, dtype, list(spec.shape))


def make_tokenizer() -> Tokenizer:
    """Build a tokenizer with one token per byte, so that most characters need several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>"])
    return tokenizer


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Return the digests of a bundle's files."""
    return {
        path.name: FileEntry(
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(), size=path.stat().st_size
        )
        for path in folder.iterdir()
        if path.is_file() and path.name != "manifest.json"
    }


def make_manifest(
    files: dict[str, FileEntry],
    tasks: list[str],
    *,
    form: str = "concat",
    target: str = "cpu",
    flavour: str = "ort",
    eos_token_ids: tuple[int, ...] = (),
) -> Manifest:
    """Build the manifest of a tiny bundle."""
    layer = KvLayer(heads=KV_HEADS, key_dim=HEAD_DIM, value_dim=HEAD_DIM)
    return Manifest(
        created_by="edgemoe tests",
        model=ModelInfo(
            family="tiny",
            name="tiny",
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            num_layers=LAYERS,
            max_position_embeddings=LONGEST,
            bos_token_id=EOS,
            eos_token_ids=eos_token_ids,
            moe_layers=tuple(range(LAYERS)),
            checkpoint_sha256="0" * 64,
        ),
        target=target,
        flavour=flavour,
        precision="fp32",
        needs_onnxruntime="1.23",
        kv_cache=KvCache(form=form, dtype="float32", layers=(layer,) * LAYERS),
        tasks={
            task: TaskEntry(
                graph=f"{task}.onnx", top_k=TOP_K, experts_per_layer=(EXPERTS,) * LAYERS
            )
            for task in tasks
        },
        inputs=_inputs(),
        outputs=_outputs(),
        k_ladder=(
            KRung(name="full", k_cap=(TOP_K,) * LAYERS),
            KRung(name="low", k_cap=(1,) * LAYERS),
        ),
        size=SizeReport(
            total_bytes=sum(entry.size for entry in files.values()),
            shared_bytes=0,
            task_bytes=dict.fromkeys(tasks, 0),
        ),
        files=files,
    )


@pytest.fixture(scope="session")
def tiny_model() -> TinyModel:
    return TinyModel.random(0)


@pytest.fixture(scope="session")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny_model: TinyModel) -> dict[str, Path]:
    """One bundle per cache form, to be read only."""
    made = {}
    for form in ("shared_buffer", "concat"):
        folder = tmp_path_factory.mktemp(form)
        _write(folder, tiny_model, ["model"], form=form)
        made[form] = folder
    return made


@pytest.fixture(params=["shared_buffer", "concat"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


@pytest.fixture
def build_bundle(tmp_path: Path, tiny_model: TinyModel) -> BuildBundle:
    """Return a function that writes a bundle to be changed by one test."""

    def build(tasks: list[str] | None = None, **more: Any) -> Path:
        folder = tmp_path / "bundle"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _write(folder, tiny_model, tasks or ["model"], **more)
        return folder

    return build


def _write(folder: Path, model: TinyModel, tasks: list[str], **more: Any) -> None:
    form = str(more.setdefault("form", "concat"))
    for task in tasks:
        onnx.save_model(
            make_graph(model, form),
            str(folder / f"{task}.onnx"),
            save_as_external_data=True,
            location=f"{task}.onnx.data",
            size_threshold=512,
        )
    make_tokenizer().save(str(folder / "tokenizer.json"))
    save_manifest(make_manifest(list_files(folder), tasks, **more), folder)
