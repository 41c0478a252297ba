"""The onnxruntime flavour against the eager model, step by step with a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch

from edgemoe.errors import ExportError
from edgemoe_exporters.graph.editor import Editor
from edgemoe_exporters.graph.metadata import EXPERT_AXIS
from edgemoe_exporters.lowering import onnxruntime as lower_ort
from edgemoe_exporters.lowering.fused.sensitive import find_sensitive
from edgemoe_exporters.lowering.quantize import quantize_blocks
from edgemoe_exporters.precision import PRECISIONS
from edgemoe_exporters.tracing.prepare.model import prepared

pytestmark = pytest.mark.fused

FAMILIES = ["glm4_moe", "qwen2_moe", "mixtral"]
HEADS, SIZE, SLOTS = 2, 16, 24
_SENSITIVE = (
    *(f"self_attn.{part}_proj.weight" for part in "qkvo"),
    "down_proj.weight",
    "embed_tokens.weight",
    "lm_head.weight",
)


def _open(model: Any) -> Any:
    data = ir.serde.serialize_model(model).SerializeToString()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(data, options)


def _read_weights(model: Any) -> None:
    for value in model.graph.initializers.values():
        value.const_value.numpy()


def _masks(padding: Any, length: Any) -> Any:
    mask = np.ones((1 if padding is None else 2, length), dtype=np.int64)
    if padding == "left":
        mask[1, :3] = 0
    if padding == "right":
        mask[1, -2:] = 0
    return mask


def _positions(mask: Any, new: Any) -> Any:
    return np.maximum(np.cumsum(mask, axis=1) - 1, 0)[:, -new:]


def _worst_difference(
    model: Any,
    session: Any,
    caps: Any,
    padding: Any,
    shared_buffer: Any,
    dtype: Any = np.float32,
) -> Any:
    """Read a prompt, then decode, always with the tokens that eager chooses."""
    rng = np.random.default_rng(0)
    layers = model.config.num_hidden_layers
    mask = _masks(padding, 7)
    rows = mask.shape[0]
    ids = rng.integers(0, model.config.vocab_size, mask.shape)
    slots = SLOTS if shared_buffer else 0
    cache = [np.zeros((rows, HEADS, slots, SIZE), dtype) for _ in range(2 * layers)]
    past = [torch.zeros(rows, HEADS, 0, SIZE)] * (2 * layers)
    names = [value.name for value in session.get_inputs()]
    assert names[-1] == "k_cap"
    worst = 0.0
    with prepared(model) as eager:
        for step in range(4):
            new = ids.shape[1]
            inputs = (ids, mask, _positions(mask, new))
            expected, past = eager(*map(torch.from_numpy, inputs), past, torch.from_numpy(caps))
            feeds = dict(zip(names[:3], inputs, strict=True))
            feeds.update(zip(names[3:-1], cache, strict=True), k_cap=caps)
            actual, *cache = session.run(None, feeds)
            read = mask[:, -new:].astype(bool)
            worst = max(worst, float(np.abs(actual - expected.numpy())[read].max()))
            ids = expected[:, -1:].argmax(-1).numpy()
            if padding is None and step == 1:
                ids = rng.integers(0, model.config.vocab_size, (1, 3))
            mask = np.concatenate([mask, np.ones_like(ids)], axis=1)
    return worst


@pytest.mark.parametrize("family", [*FAMILIES, "grouped", "windowed", "based"])
def test_fp32_equals_eager(traced_models: Any, family: Any) -> None:
    traced = traced_models(family)
    session = _open(lower_ort.lower(traced.graph, "fp32"))
    layers = len(traced.model.layers)
    full, mixed = np.full(layers, 99), np.array([1, 2, 99][:layers], dtype=np.int64)
    cases = [
        (full, None, False),
        (full, "left", True),
        (full, "right", False),
        (mixed, None, True),
        (mixed, "left", False),
        (mixed, "right", True),
    ]
    for case in cases:
        assert _worst_difference(traced.model, session, *case) <= 1e-4, case


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "int4") for family in (*FAMILIES, "grouped", "based")), ("glm4_moe", "int8")],
)
def test_blocks_equal_eager_with_quantised_weights(
    traced_models: Any,
    dequantize_blocks: Any,
    family: Any,
    name: Any,
    monkeypatch: Any,
) -> None:
    """Where activations are not rounded, the only difference to eager is in the weights."""
    traced = traced_models(family)
    precision = dataclasses.replace(PRECISIONS[name], accuracy_level=0)
    monkeypatch.setitem(PRECISIONS, "exact", precision)
    lowered = lower_ort.lower(traced.graph, "exact")
    quantised = {
        part.removesuffix(".quantised").removesuffix(".rows")
        for part in lowered.graph.initializers
        if part.endswith((".quantised", ".rows"))
    }
    state = traced.model.model.state_dict()
    layers = traced.model.layers
    scaling = {layer.down.data_ptr(): layer.rule.scaling_factor for layer in layers}
    sensitive = find_sensitive(Editor(traced.graph))
    assert sensitive == {name for name in quantised if name.endswith(_SENSITIVE)}
    originals = {weight_name: state[weight_name].clone() for weight_name in quantised}
    session = _open(lowered)  # reads the weights
    try:
        for weight_name, weight in originals.items():
            factor = scaling.get(state[weight_name].data_ptr(), 1.0)
            bits = 8 if weight_name in sensitive else precision.bits
            blocks = quantize_blocks(weight.numpy() * np.float32(factor), bits, 32, False)
            exact = torch.from_numpy(dequantize_blocks(blocks, bits) / factor)
            state[weight_name].copy_(exact)
        caps = np.full(len(traced.model.layers), 2)
        for padding in (None, "left"):
            worst = _worst_difference(traced.model, session, caps, padding, True)
            # QMoE rounds activations in any case where weights have 8 bits.
            assert worst <= (1e-3 if name == "int4" else 0.05)
    finally:
        for weight_name, weight in originals.items():
            state[weight_name].copy_(weight)
    expected = {name for name in state if name.endswith("proj.weight") or ".experts." in name}
    assert expected <= quantised


@pytest.mark.parametrize(("precision", "tolerance"), [("fp16", 0.05), ("int8", 0.6)])
def test_lower_precision_stays_close(
    traced_models: Any, precision: Any, tolerance: Any
) -> None:
    traced = traced_models("mixtral")
    session = _open(lower_ort.lower(traced.graph, precision))
    dtype = np.float16 if precision == "fp16" else np.float32
    caps = np.full(len(traced.model.layers), 99)
    worst = _worst_difference(traced.model, session, caps, "left", True, dtype)
    assert worst <= tolerance


def test_dropped_experts_are_skipped(traced_models: Any) -> None:
    """An expert that no token uses may hold anything: it is not even multiplied."""
    traced = traced_models("mixtral")
    model = traced.model
    caps = np.full(len(model.layers), 1)
    for precision in ("fp32", "int4"):
        lowered = lower_ort.lower(traced.graph, precision)
        session = _open(lowered)
        feeds = {
            "input_ids": np.array([[5]]),
            "attention_mask": np.array([[1]]),
            "position_ids": np.array([[0]]),
            "k_cap": caps,
        }
        for value in session.get_inputs():
            if "past" in value.name:
                feeds[value.name] = np.zeros((1, HEADS, 0, SIZE), np.float32)
        expected = session.run(["logits"], feeds)[0]
        changed = 0
        suffix = "down_proj.scaled" if precision == "fp32" else "down_proj.scales"
        names = [name for name in lowered.graph.initializers if name.endswith(suffix)]
        for expert in range(6):
            scaled: Any = lowered.graph.initializers[names[0]]
            array = scaled.const_value.numpy()
            broken = array.copy()
            broken[expert] = np.nan
            scaled.const_value = ir.tensor(broken)
            logits = _open(lowered).run(["logits"], feeds)[0]
            changed += not np.array_equal(logits, expected)
            scaled.const_value = ir.tensor(array)
        assert changed == 1, precision


def test_experts_stay_on_axis_0(traced_models: Any) -> None:
    traced = traced_models("glm4_moe")
    for precision in ("fp32", "int4"):
        lowered = lower_ort.lower(traced.graph, precision)
        counts = [layer.num_experts for layer in traced.model.layers]
        indices = [str(layer.index) for layer in traced.model.layers]
        marked: list[Any] = [
            value
            for value in lowered.graph.initializers.values()
            if value.metadata_props.get(EXPERT_AXIS) == "0"
        ]
        per_layer = 4 if precision == "fp32" else 8
        # The first layer's correction bias is zero and falls away.
        assert len(marked) == 2 * per_layer - 1
        for value in marked:
            layer = indices.index(value.metadata_props["edgemoe.layer"])
            assert value.shape[0] == counts[layer]
            assert value.const_value.numpy().flags["C_CONTIGUOUS"]


def test_lowering_leaves_the_traced_graph_alone(traced_models: Any) -> None:
    graph = traced_models("qwen2_moe").graph
    before = ir.serde.serialize_model(graph).SerializeToString()
    for precision in PRECISIONS:
        lower_ort.lower(graph, precision)
    assert ir.serde.serialize_model(graph).SerializeToString() == before


def test_weights_beyond_half_precision_are_refused(traced_models: Any) -> None:
    traced = traced_models("mixtral")
    down = traced.model.layers[0].down
    before = down[0, 0, 0].item()
    try:
        down[0, 0, 0] = 1e5
        lowered = lower_ort.lower(traced.graph, "fp16")
        with pytest.raises(ExportError, match=r"range of float16.*--precision fp32"):
            _read_weights(lowered)
    finally:
        down[0, 0, 0] = before


def test_unknown_precision_is_refused(traced_models: Any) -> None:
    with pytest.raises(ExportError, match="precision must be one of fp32, fp16, int8, int4"):
        lower_ort.lower(traced_models("mixtral").graph, "int3")
