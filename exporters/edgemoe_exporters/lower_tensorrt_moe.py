"""Routing and experts in ops that TensorRT builds.

TensorRT builds neither com.microsoft.MoE nor scatter-add nor NonZero, and its own MoE layer
exists on data-centre Blackwell and Jetson Thor only. That leaves three ways (E experts, k per
token, T tokens):

- *dense*: all experts of a layer are one wide feed-forward network, whose hidden units are
  multiplied by the gate of their expert, or 0. Two matrix products per layer whatever E is,
  no data-dependent shape, and the weights stay as the checkpoint stacks them. It reads and
  multiplies E experts.
- *gather*: copy the k experts of each token, then multiply. A copy reads and writes and the
  product reads again, so this moves 3 T k experts.
- *sorted*: group tokens by expert. About 15 nodes per expert and layer and data-dependent
  shapes: 7000 nodes for 16 experts in 30 layers. Not used.

So dense is the cheapest at any T where E <= 3 k, which holds for what pruning leaves; beyond
it, each layer chooses as it runs: gather while 3 T k <= E, as when generating, dense above.
This counts weight traffic; no GPU has run it yet.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from edgemoe.errors import ExportError
from edgemoe_exporters.bundle import EXPERT_AXIS_KEY, LAYER_KEY
from edgemoe_exporters.initializers import set_weight, weight_of
from edgemoe_exporters.lower_tensorrt_emit import (
    FLOAT32,
    Emitter,
    size_of,
)

ExpertsForm = Literal["auto", "dense", "gather"]

# A gathered expert is read, written and read again.
_GATHER_TRAFFIC = 3
# What transformers adds to the sum of sigmoid scores.
_SIGMOID_SUM_EPSILON = 1e-20
_HIDDEN = -6e4
_LAYER = re.compile(r"\.layers\.(\d+)\.")


@dataclass(frozen=True, kw_only=True)
class RouteRule:
    """The attributes of a Route node.

    Attributes:
        k_cap_index: Which element of the input k_cap is this layer's.
        top_k: Experts per token without a cap.
        scoring: ``softmax`` or ``sigmoid``.
        softmax_over: ``all`` experts or the ``top_k`` chosen.
        renormalise: Whether the gates are divided by their sum.
        scaling_factor: Multiplies the gates.
        n_group: Groups of experts.
        topk_group: Groups a token may use.
    """

    k_cap_index: int
    top_k: int
    scoring: str
    softmax_over: str
    renormalise: bool
    scaling_factor: float
    n_group: int
    topk_group: int

    @classmethod
    def of(cls, node: ir.Node) -> RouteRule:
        """Read a node's attributes."""
        attributes = node.attributes
        return cls(
            k_cap_index=attributes["k_cap_index"].as_int(),
            top_k=attributes["top_k"].as_int(),
            scoring=attributes["scoring"].as_string(),
            softmax_over=attributes["softmax_over"].as_string(),
            renormalise=bool(attributes["renormalise"].as_int()),
            scaling_factor=attributes["scaling_factor"].as_float(),
            n_group=attributes["n_group"].as_int(),
            topk_group=attributes["topk_group"].as_int(),
        )

    @property
    def softmax_of_chosen(self) -> bool:
        """Whether the softmax runs over the chosen experts only."""
        return self.scoring == "softmax" and self.softmax_over == "top_k"


def lower_route(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Choose experts in float32.

    The logits are an elementwise product and a sum, not a matrix product: TensorRT may round
    float32 matrix products to TF32, has none for Turing, and experts are chosen by differences
    smaller than what TF32 keeps.

    Args:
        emit: Takes the nodes.
        node: A Route node; its weights are float32 already.

    Returns:
        Gates, float32 ``[T, k]``, 0 beyond the cap, and expert ids, int64 ``[T, k]``.
    """
    hidden, weight, bias, k_cap = node.inputs
    assert hidden is not None
    assert weight is not None
    assert k_cap is not None
    rule = RouteRule.of(node)
    mark_experts(weight)
    rows = emit.call("Unsqueeze", emit.wide(hidden), emit.integers(1))
    products = emit.call("Mul", rows, weight)
    logits = emit.call("ReduceSum", products, emit.integers(-1), keepdims=0)
    scores = _scores(emit, rule, logits)
    choice = _choice(emit, rule, logits, scores, bias, size_of(weight, 0))
    _, indices = emit.call_many("TopK", 2, choice, emit.integers(rule.top_k), axis=-1)
    gates = emit.call("GatherElements", scores, indices, axis=1)
    cap = emit.call("Gather", k_cap, emit.integers(rule.k_cap_index), axis=0)
    used = emit.call("Less", emit.integers(*range(rule.top_k)), cap)
    if rule.softmax_of_chosen:
        gates = emit.call("Softmax", _where(emit, used, gates, _HIDDEN), axis=-1)
    gates = _where(emit, used, gates, 0.0)
    if rule.renormalise and not rule.softmax_of_chosen:
        total = emit.call("ReduceSum", gates, emit.integers(-1), keepdims=1)
        if rule.scoring == "sigmoid":
            total = emit.call("Add", total, emit.number(_SIGMOID_SUM_EPSILON))
        gates = emit.call("Div", gates, total)
    if rule.scaling_factor != 1.0:
        gates = emit.call("Mul", gates, emit.number(rule.scaling_factor))
    gates.type = ir.TensorType(FLOAT32)
    return [gates, indices]


def lower_experts(emit: Emitter, node: ir.Node, form: ExpertsForm) -> list[ir.Value]:
    """Run the chosen experts.

    Args:
        emit: Takes the nodes.
        node: An Experts node; its weights are what a lowered Route gave: float32 ``[T, k]``,
            0 where a slot is not used.
        form: How; ``auto`` as the module says.

    Returns:
        Output ``[T, H]``.

    Raises:
        ExportError: The activation is not SiLU.
    """
    hidden, indices, gates, gate_up, down = node.inputs
    assert hidden is not None
    assert gates is not None
    assert indices is not None
    assert gate_up is not None
    assert down is not None
    activation = node.attributes["activation"].as_string()
    if activation != "silu":
        raise ExportError(f"activation of experts must be silu, got {activation!r}.")
    layer = _Layer(
        hidden=hidden,
        indices=indices,
        gates=gates,
        gate_up=gate_up,
        down=down,
        experts=size_of(gate_up, 0),
        top_k=size_of(indices, 1),
        width=size_of(gate_up, 1) // 2,
        hidden_size=size_of(gate_up, 2),
    )
    mark_experts(gate_up)
    mark_experts(down)
    # [E, H, I] -> [E, I, H]: the dense form's second product reads it as it lies.
    set_weight(down, weight_of(down).transpose(0, 2, 1))
    most = layer.experts // (_GATHER_TRAFFIC * layer.top_k)
    if form == "dense" or (form == "auto" and most < 1):
        return [_dense(emit, layer)]
    if form == "gather":
        return [_gather(emit, layer)]
    return [_gather_or_dense(emit, layer, most)]


def mark_experts(value: ir.Value) -> None:
    """Say that a weight has one row per expert, so that tasks can share what is common."""
    match = _LAYER.search(str(value.name))
    if match is not None:
        value.metadata_props[EXPERT_AXIS_KEY] = "0"
        value.metadata_props[LAYER_KEY] = match.group(1)


@dataclass(frozen=True, kw_only=True)
class _Layer:
    hidden: ir.Value
    indices: ir.Value
    gates: ir.Value
    gate_up: ir.Value
    down: ir.Value
    experts: int
    top_k: int
    width: int
    hidden_size: int


def _scores(emit: Emitter, rule: RouteRule, logits: ir.Value) -> ir.Value:
    if rule.scoring == "sigmoid":
        # Spelled out: a GPU's Sigmoid may be an approximate tanh, good to 11 bits only.
        decay = emit.call("Exp", emit.call("Neg", logits))
        one = emit.number(1.0)
        return emit.call("Div", one, emit.call("Add", one, decay))
    return logits if rule.softmax_of_chosen else emit.call("Softmax", logits, axis=-1)


def _choice(
    emit: Emitter,
    rule: RouteRule,
    logits: ir.Value,
    scores: ir.Value,
    bias: ir.Value | None,
    experts: int,
) -> ir.Value:
    """Return what the experts are chosen by."""
    biased = bias is not None and bool(weight_of(bias).any())
    if rule.topk_group >= rule.n_group and not biased:
        # The scores rise with the logits, and a GPU's fast exponential would round them.
        return logits
    choice = emit.call("Add", scores, bias) if biased else scores
    if rule.topk_group >= rule.n_group:
        return choice
    size = experts // rule.n_group
    grouped = emit.call("Reshape", choice, emit.integers(-1, rule.n_group, size))
    best, _ = emit.call_many("TopK", 2, grouped, emit.integers(2), axis=-1)
    group_scores = emit.call("ReduceSum", best, emit.integers(-1), keepdims=0)
    kept, _ = emit.call_many("TopK", 2, group_scores, emit.integers(rule.topk_group), axis=-1)
    least = emit.call("ReduceMin", kept, emit.integers(-1), keepdims=1)
    allowed = emit.call("GreaterOrEqual", group_scores, least)
    allowed = emit.call("Unsqueeze", allowed, emit.integers(-1))
    masked = emit.call("Where", allowed, grouped, emit.number(_HIDDEN))
    return emit.call("Reshape", masked, emit.integers(-1, experts))


def _dense(emit: Emitter, layer: _Layer) -> ir.Value:
    experts, width, hidden_size = layer.experts, layer.width, layer.hidden_size
    ids = emit.integers(*range(experts))
    chosen = emit.call("Equal", emit.call("Unsqueeze", layer.indices, emit.integers(-1)), ids)
    spread = _where(emit, chosen, emit.call("Unsqueeze", layer.gates, emit.integers(-1)), 0.0)
    gates = emit.narrow(emit.call("ReduceSum", spread, emit.integers(1), keepdims=0))
    gates = emit.call("Unsqueeze", gates, emit.integers(2, 3))
    rows = emit.call("Reshape", layer.gate_up, emit.integers(-1, hidden_size))
    projected = emit.call("Gemm", layer.hidden, rows, transB=1)
    projected = emit.call("Reshape", projected, emit.integers(-1, experts, 2, width))
    activated = _activate(emit, projected, gates, half=1)
    activated = emit.call("Reshape", activated, emit.integers(-1, experts * width))
    rows = emit.call("Reshape", layer.down, emit.integers(-1, hidden_size))
    return emit.call("MatMul", activated, rows)


def _gather(emit: Emitter, layer: _Layer) -> ir.Value:
    units = layer.top_k * layer.width
    # An unused slot has gate 0; its id may be the sentinel E, which is out of range.
    last = emit.integer(layer.experts - 1)
    ids = emit.call("Min", layer.indices, last)
    gate_up = emit.call("Gather", layer.gate_up, ids, axis=0)
    down = emit.call("Gather", layer.down, ids, axis=0)
    column = emit.call("Unsqueeze", layer.hidden, emit.integers(1, 3))
    gates = emit.call("Unsqueeze", emit.narrow(layer.gates), emit.integers(2, 3))
    projected = emit.call("MatMul", gate_up, column)
    activated = _activate(emit, projected, gates, half=layer.width)
    activated = emit.call("Reshape", activated, emit.integers(-1, 1, units))
    down = emit.call("Reshape", down, emit.integers(-1, units, layer.hidden_size))
    return emit.call("Squeeze", emit.call("MatMul", activated, down), emit.integers(1))


def _gather_or_dense(emit: Emitter, layer: _Layer, most: int) -> ir.Value:
    shape = emit.call("Shape", layer.hidden, start=0, end=1)
    few = emit.call("Squeeze", emit.call("LessOrEqual", shape, emit.integers(most)))
    branches = {}
    for name, lower in (("then", _gather), ("else", _dense)):
        inner = emit.branch(name)
        output = lower(inner, layer)
        branches[f"{name}_branch"] = ir.Graph(
            [], [output], nodes=inner.nodes, name=f"{emit.prefix}/{name}"
        )
        output.type = ir.TensorType(emit.compute)
        output.shape = ir.Shape([None, layer.hidden_size])
    return emit.call("If", few, **branches)


def _activate(emit: Emitter, projected: ir.Value, gates: ir.Value, half: int) -> ir.Value:
    """Split axis 2 into the gate and the up half; return silu(gate) * gates * up.

    The router's gate comes in before the product, which in float16 may overflow where an
    expert was not chosen, and infinity times zero is no number.
    """
    gate, up = emit.call_many("Split", 2, projected, emit.integers(half, half), axis=2)
    gated = emit.call("Mul", emit.call("Mul", gate, emit.call("Sigmoid", gate)), gates)
    return emit.call("Mul", gated, up)


def _where(emit: Emitter, condition: ir.Value, value: ir.Value, otherwise: float) -> ir.Value:
    return emit.call("Where", condition, value, emit.number(otherwise))
