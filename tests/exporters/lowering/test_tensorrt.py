"""The TensorRT lowering, run in onnxruntime, against the eager model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Glm4MoeConfig,
    MixtralConfig,
    Qwen2MoeConfig,
)

from edgemoe.errors import ExportError
from edgemoe.models import RouterRule
from edgemoe.models.adapter import adapt_model
from edgemoe.models.hooks import limit_k
from edgemoe.models.tiny import tiny_config, tiny_model
from edgemoe_exporters.graph.metadata import SETS_SHAPES
from edgemoe_exporters.lowering import tensorrt as lower_tensorrt
from edgemoe_exporters.lowering.tensorrt import MAX_OPSET, lower
from edgemoe_exporters.tracing import ops
from edgemoe_exporters.tracing.trace import trace

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.contract import MoeModel

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 32,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
}
# Experts and k of each: E <= 3k is dense, E > 3k chooses between gather and dense as it runs.
CONFIGS = {
    "glm4_moe": Glm4MoeConfig(
        **COMMON,
        head_dim=16,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=1,
        first_k_dense_replace=0,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        partial_rotary_factor=0.5,
        tie_word_embeddings=True,
    ),
    "qwen2_moe": Qwen2MoeConfig(
        **COMMON,
        num_experts=8,
        num_experts_per_tok=2,
        shared_expert_intermediate_size=48,
        norm_topk_prob=True,
    ),
    "mixtral": MixtralConfig(
        **{name: value for name, value in COMMON.items() if name != "moe_intermediate_size"},
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
    "windowed": MixtralConfig(
        **{name: value for name, value in COMMON.items() if name != "moe_intermediate_size"},
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=4,
    ),
}
# What TensorRT 10.3 to 11 refuse, or what JetPack 6.2 does not know.
REFUSED = {"NonZero", "ScatterND", "Attention", "RotaryEmbedding", "MoE"}

_traced: dict[str, tuple[MoeModel, ir.Model]] = {}


def traced(family: str) -> tuple[MoeModel, ir.Model]:
    """Return a tiny model, its second layer with fewer experts, and a copy of its trace."""
    if family not in _traced:
        torch.set_num_threads(1)
        torch.manual_seed(1)
        model = adapt_model(AutoModelForCausalLM.from_config(CONFIGS[family]))
        for layer in model.layers:
            layer.router_weight.normal_()
        model.layers[1].keep([0, 2, 3])
        if model.layers[0].correction_bias is not None:
            model.layers[0].correction_bias.normal_(std=0.3)
        _traced[family] = (model, trace(model))
    model, graph = _traced[family]
    return model, graph.clone()


class Graph:
    """A lowered graph in onnxruntime, with its cache."""

    def __init__(self, model: ir.Model, folder: Path) -> None:
        self.path = folder / "graph.onnx"
        ir.save(model, self.path)
        onnx.checker.check_model(str(self.path), full_check=True)
        self.session = onnxruntime.InferenceSession(
            str(self.path), providers=["CPUExecutionProvider"]
        )
        self.past: dict[str, np.ndarray[Any, Any]] = {}

    def logits(
        self, ids: torch.Tensor, mask: torch.Tensor, steps: list[int], k_cap: list[int]
    ) -> torch.Tensor:
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        past = {
            item.name: np.zeros((len(ids), item.shape[1], 0, item.shape[3]), kinds[item.type])
            for item in self.session.get_inputs()
            if item.name.startswith("past_key_values")
        }
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        names = [item.name for item in self.session.get_outputs()]
        logits, start = [], 0
        for count in steps:
            stop = start + count
            feeds = {
                "input_ids": ids[:, start:stop].numpy(),
                "attention_mask": mask[:, :stop].numpy(),
                "position_ids": positions[:, start:stop].numpy(),
                "k_cap": np.array(k_cap, dtype=np.int64),
            }
            outputs = self.session.run(None, feeds | past)
            results = dict(zip(names, outputs, strict=True))
            past = {name: results[name.replace("past_key_values", "present")] for name in past}
            logits.append(torch.from_numpy(results["logits"]))
            start = stop
        return torch.cat(logits, dim=1)


def eager(model: MoeModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        output = model.model(input_ids=ids, attention_mask=mask, position_ids=positions)
    logits: torch.Tensor = output.logits
    return logits


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (2, 11), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    return ids, mask


@pytest.mark.parametrize("family", CONFIGS)
def test_prefill_and_decode_with_padding_and_caps_agree_with_eager(
    family: str, tmp_path: Path
) -> None:
    model, graph = traced(family)
    lowered = Graph(lower(graph, "fp32"), tmp_path)
    ids, mask = padded_batch()
    top_k = model.layers[0].top_k
    for k_cap in ([top_k, top_k], [1, top_k], [2, 1]):
        with limit_k(model, k_cap):
            expected = eager(model, ids, mask)
        found = lowered.logits(ids, mask, [6, 1, 3, 1], k_cap)
        difference = (found - expected)[mask.bool()].abs().max()
        assert difference <= 1e-4, k_cap


def test_static_shapes_agree_with_eager(tmp_path: Path) -> None:
    model, graph = traced("qwen2_moe")
    lowered = Graph(lower(graph, "fp32", static_shapes=True), tmp_path)
    ids, mask = padded_batch()
    found = lowered.logits(ids, mask, [10, 1], [2, 1])
    with limit_k(model, [2, 1]):
        expected = eager(model, ids, mask)
    assert (found - expected)[mask.bool()].abs().max() <= 1e-4


def sets_shapes(lowered: ir.Model) -> bool:
    """Whether a graph says that shapes follow its caps; those in which they do have a TopK of
    tokens in each layer, and put its answer back by ScatterElements."""
    (caps,) = [value for value in lowered.graph.inputs if value.name == "k_cap"]
    follows = any(node.op_type == "ScatterElements" for node in lowered.graph)
    assert follows == (SETS_SHAPES in caps.metadata_props)
    return follows


def test_shapes_follow_caps_but_where_tensorrt_cannot_take_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert sets_shapes(lower(traced("qwen2_moe")[1], "fp16"))
    assert not sets_shapes(lower(traced("qwen2_moe")[1], "fp16", static_shapes=True))
    monkeypatch.setattr(lower_tensorrt, "MAX_SHAPE_NUMBERS", 1)
    assert not sets_shapes(lower(traced("qwen2_moe")[1], "fp16"))


@pytest.mark.slow
@pytest.mark.states
def test_no_shape_follows_caps_beside_a_scan() -> None:
    model = adapt_model(tiny_model(tiny_config("qwen3_next")))
    lowered = lower(trace(model), "fp16")
    assert any(node.op_type == "Scan" for node in lowered.graph)
    assert not sets_shapes(lowered)


def test_layers_choose_as_they_run() -> None:
    _, graph = traced("qwen2_moe")
    counts = [node.op_type for node in lower(graph, "fp32").graph].count("If")
    assert counts == 2


def test_half_precision_keeps_what_chooses_in_float32(tmp_path: Path) -> None:
    model, graph = traced("glm4_moe")
    lowered = lower(graph, "fp16")
    weights = lowered.graph.initializers
    assert weights["model.layers.0.mlp.gate.weight"].dtype == ir.DataType.FLOAT
    assert weights["model.norm.weight"].dtype == ir.DataType.FLOAT
    assert weights["model.layers.0.mlp.experts.gate_up_proj"].dtype == ir.DataType.FLOAT16
    assert weights["model.embed_tokens.weight"].dtype == ir.DataType.FLOAT16
    types = {value.name: value.dtype for value in lowered.graph.outputs}
    assert types.pop("logits") == ir.DataType.FLOAT
    assert set(types.values()) == {ir.DataType.FLOAT16}
    ids, mask = padded_batch()
    found = Graph(lowered, tmp_path).logits(ids, mask, [10, 1], [3, 3])
    expected = eager(model, ids, mask)
    same = (found - expected)[mask.bool()].abs().amax(-1) < 0.05
    assert same.float().mean() > 0.8  # experts with nearly equal scores may swap in float16


@pytest.mark.parametrize("family", CONFIGS)
def test_graph_has_only_ops_that_jetpack_parses(family: str) -> None:
    _, graph = traced(family)
    lowered = lower(graph, "fp16")
    nodes = [*ir.traversal.RecursiveGraphIterator(lowered.graph)]
    assert {node.domain for node in nodes} == {""}
    assert not REFUSED & {node.op_type for node in nodes}
    scatters = [node for node in nodes if node.op_type == "ScatterElements"]
    assert not [node for node in scatters if "reduction" in node.attributes]
    assert set(lowered.opset_imports) == {""}
    assert lowered.opset_imports[""] <= MAX_OPSET
    assert len(nodes) < 200 * 2  # whatever the number of experts


def test_stacks_of_experts_say_so() -> None:
    _, graph = traced("glm4_moe")
    weights = lower(graph, "fp32").graph.initializers
    for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
        value = weights[f"model.layers.1.mlp.{name}"]
        assert value.metadata_props == {"edgemoe.expert_axis": "0", "edgemoe.layer": "1"}
        assert value.shape is not None
        assert value.shape[0] == 3


RULES = {
    "grouped": RouterRule(
        scoring="sigmoid", renormalise=True, sum_epsilon=1e-20, n_group=4, topk_group=2
    ),
    "half the groups": RouterRule(
        scoring="sigmoid", renormalise=False, n_group=2, topk_group=1, group_fill=0.0
    ),
    "best of groups": RouterRule(
        scoring="softmax", renormalise=False, n_group=4, topk_group=2, group_score="max"
    ),
    "scaled": RouterRule(scoring="sigmoid", renormalise=False, scaling_factor=2.5),
    "bias on logits": RouterRule(scoring="sigmoid", renormalise=True, bias_on="logits"),
    "root of softplus": RouterRule(scoring="sqrtsoftplus", renormalise=True),
    "over the chosen": RouterRule(scoring="softmax", renormalise=False, softmax_over="top_k"),
    "none at times": RouterRule(scoring="softmax", renormalise=False, idle=2),
    "with shared experts": RouterRule(scoring="sigmoid", renormalise=True, shared=2),
    "by id": RouterRule(scoring="sqrtsoftplus", renormalise=True, scaling_factor=1.5),
    "mixer": RouterRule(scoring="sparsemixer", renormalise=False, jitter=0.2),
}


@pytest.mark.parametrize("name", RULES)
def test_routing_agrees_with_the_op(name: str, tmp_path: Path) -> None:
    rule = RULES[name]
    torch.manual_seed(3)
    hidden, k_cap = torch.randn(50, 16), torch.tensor([1, 2])
    weights = {
        "weight": torch.randn(8 + rule.further_rows, 16),
        "logit_bias": 0.3 * torch.randn(8 + rule.further_rows),
        "correction_bias": 0.3 * torch.randn(8 + rule.idle),
        "expert_scale": torch.rand(8 + rule.idle),
    }
    if rule.scoring in {"softmax", "sparsemixer"} and not rule.idle:
        del weights["correction_bias"]
    attributes: dict[str, Any] = {
        "k_cap_index": 1,
        "top_k": 3,
        "scoring": rule.scoring,
        "softmax_over": rule.softmax_over,
        "renormalise": rule.renormalise,
        "sum_epsilon": rule.sum_epsilon,
        "scaling_factor": rule.scaling_factor,
        "bias_on": rule.bias_on,
        "n_group": rule.n_group,
        "topk_group": rule.topk_group,
        "group_score": rule.group_score,
        "group_fill": rule.group_fill,
        "jitter": rule.jitter,
        "idle": rule.idle,
        "shared": rule.shared,
    }
    order = ("weight", "logit_bias", "correction_bias", "expert_scale")
    tensors = [weights.get(part) for part in order]
    chosen = torch.rand(50, 8).argsort(dim=-1)[:, :3] if name == "by id" else None
    if chosen is not None:
        tensors, weights = [weights["weight"], None, None, None], {"weight": weights["weight"]}
    expected, ids = ops.route(hidden, *tensors, chosen, k_cap, **attributes)
    inputs = [
        ir.val("hidden", ir.DataType.FLOAT, (50, 16)),
        ir.val("k_cap", ir.DataType.INT64, (2,)),
    ]
    values = {
        part: ir.Value(
            name=part,
            shape=ir.Shape(tensor.shape),
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=ir.tensor(tensor.numpy(), name=part),
        )
        for part, tensor in weights.items()
    }
    if chosen is not None:
        inputs.append(ir.val("chosen", ir.DataType.INT64, (50, 3)))
    last: list[ir.Value | None] = [*inputs[2:]] or [None]
    node = ir.node(
        "Route",
        [inputs[0], *(values.get(part) for part in order), *last, inputs[1]],
        attributes={
            part: int(value) if isinstance(value, bool) else value
            for part, value in attributes.items()
        },
        domain="edgemoe",
        num_outputs=2,
    )
    for output, part, kind in zip(
        node.outputs, ("gates", "ids"), (ir.DataType.FLOAT, ir.DataType.INT64), strict=True
    ):
        output.name, output.dtype, output.shape = part, kind, ir.Shape((50, 3))
    graph = ir.Graph(
        inputs,
        node.outputs,
        nodes=[node],
        initializers=list(values.values()),
        opset_imports={"": 20, "edgemoe": 1},
        name="route",
    )
    path = tmp_path / "route.onnx"
    ir.save(lower(ir.Model(graph, ir_version=10), "fp32"), path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {"hidden": hidden.numpy(), "k_cap": k_cap.numpy()}
    if chosen is not None:
        feeds["chosen"] = chosen.numpy()
    gates, found = session.run(None, feeds)
    np.testing.assert_allclose(gates, expected.numpy(), atol=2e-6)
    used = expected.numpy() > 0
    np.testing.assert_array_equal(found[used], ids.numpy()[used])


def test_other_precisions_are_refused() -> None:
    with pytest.raises(ExportError, match="must be one of fp32, fp16, got 'int4'"):
        lower(ir.Model(ir.Graph([], [], nodes=[]), ir_version=10), "int4")


def test_weights_beyond_half_precision_are_refused() -> None:
    _, graph = traced("mixtral")
    name = "model.layers.0.self_attn.q_proj.weight"
    value = graph.graph.initializers[name]
    value.const_value = ir.tensor(np.full((64, 64), 1e6, dtype=np.float32), name=name)
    narrow = lower(graph, "fp16").graph.initializers[name].const_value
    assert narrow is not None
    with pytest.raises(ExportError, match=r"got 1e\+06 in .*q_proj.weight"):
        narrow.numpy()
