"""Routing in primitive ops, in float32; for TensorRT, and where onnxruntime fuses nothing.

The logits are an elementwise product and a sum, not a matrix product: TensorRT may round
float32 matrix products to TF32, has none for Turing, and experts are chosen by differences
smaller than what TF32 keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from edgemoe_exporters.graph.builder import FLOAT32, Emitter, size_of

if TYPE_CHECKING:
    from edgemoe.models.routing.rule import RouterRule
    from edgemoe_exporters.graph.nodes import RouteNode

_LOW = -6e4


def lower_route(emit: Emitter, route: RouteNode) -> tuple[list[ir.Value], ir.Value]:
    """Choose experts in float32.

    Args:
        emit: Takes the nodes.
        route: A Route node; its weights are float32 already.

    Returns:
        The node's outputs: gates, float32 `[T, k]`, 0 beyond the cap, and expert ids, int64
        `[T, k]`; where the node counts, also the number of experts that its tokens use, int64
        `[1]`. Then the most slots that any token uses, int64 `[1]`.
    """
    rule = route.rule
    rows = emit.call("Unsqueeze", emit.wide(route.hidden), emit.integers(1))
    logits = _project(emit, rows, route.weight)
    if route.logit_bias is not None:
        logits = emit.call("Add", logits, route.logit_bias)
    cap = emit.call("Gather", route.k_cap, emit.integers(route.k_cap_index), axis=0)
    slots = emit.integers(*range(route.top_k))
    if route.allocator is not None:
        # The first row stands for one expert, so the index of the largest is one too low.
        scores = _project(emit, rows, route.allocator)
        scores = emit.call("Add", scores, route.allocator_bias)
        allocated = emit.call("ArgMax", scores, axis=-1, keepdims=1)
        cap = emit.call("Min", cap, emit.call("Add", allocated, emit.integers(1)))
    used = emit.call("Less", slots, cap)
    if rule.scoring == "sparsemixer":
        gates, indices = sparsemixer(emit, logits, rule.jitter, route.top_k)
        used = _within_top_p(emit, route, logits, indices, used)
        gates = where(emit, used, gates, 0.0)
    else:
        gates, indices, used = _choose(emit, route, logits, used)
    within = used
    if rule.idle:
        taken = emit.call("Less", indices, emit.integers(route.experts))
        used = emit.call("And", used, taken)
        gates = where(emit, taken, gates, 0.0)
        # The gate is 0 there, so that any expert will do.
        indices = emit.call("Where", taken, indices, emit.integers(0))
    if route.expert_scale is not None:
        scale = emit.call("Gather", route.expert_scale, indices, axis=0)
        gates = emit.call("Mul", gates, scale)
    if rule.scaling_factor != 1.0:
        gates = emit.call("Mul", gates, emit.number(rule.scaling_factor))
    gates.type = ir.TensorType(FLOAT32)
    outputs = [gates, indices, *([_count(emit, used, indices)] if route.counts else [])]
    return outputs, _max_used(emit, route, within)


def lower_shared_gates(emit: Emitter, node: ir.Node) -> list[ir.Value]:
    """Give the experts that every token uses what the chosen ones leave, by their scores.

    Args:
        emit: Takes the nodes.
        node: A SharedGates node.

    Returns:
        Gates `[T, shared]`, in the type of activations.
    """
    hidden, weight, weights = node.inputs
    assert hidden is not None
    assert weight is not None
    assert weights is not None
    count = node.attributes["count"].as_int()
    rows = emit.call("Unsqueeze", emit.wide(hidden), emit.integers(1))
    end = emit.integers(size_of(weight, 0))
    start = emit.integers(size_of(weight, 0) - count)
    of_shared = emit.call("Slice", emit.wide(weight), start, end, emit.integers(0))
    logits = _project(emit, rows, of_shared)
    one = emit.number(1.0)
    decay = emit.call("Exp", emit.call("Neg", logits))
    scores = emit.call("Div", one, emit.call("Add", one, decay))
    axis = emit.integers(-1)
    given = emit.call("ReduceSum", emit.wide(weights), axis, keepdims=1)
    rest = emit.call("Sub", emit.number(node.attributes["scale"].as_float()), given)
    total = emit.call("ReduceSum", scores, axis, keepdims=1)
    return [emit.narrow(emit.call("Div", emit.call("Mul", rest, scores), total))]


def _max_used(emit: Emitter, route: RouteNode, used: ir.Value) -> ir.Value:
    """Return the most slots that any token uses, int64 `[1]`."""
    if route.allocator is None and not route.top_p:
        # The cap itself, which TensorRT knows before it runs anything.
        cap = emit.call("Gather", route.k_cap, emit.integers(route.k_cap_index), axis=0)
        return emit.call("Min", cap, emit.integers(route.top_k))
    each = emit.call("ReduceSum", emit.call("Cast", used, to=FLOAT32), emit.integers(1))
    max_used = emit.call(
        "ReduceMax", emit.call("Squeeze", each, emit.integers(1)), emit.integers(0)
    )
    return emit.call("Cast", max_used, to=ir.DataType.INT64)


def _count(emit: Emitter, used: ir.Value, indices: ir.Value) -> ir.Value:
    """Count the slots that are used; `used` may be the same for all tokens."""
    whole = emit.call("Expand", used, emit.call("Shape", indices))
    ones = emit.call("Cast", whole, to=ir.DataType.INT64)
    return emit.call("ReduceSum", emit.call("Reshape", ones, emit.integers(-1)), keepdims=1)


def _project(emit: Emitter, rows: ir.Value, weight: ir.Value) -> ir.Value:
    """Multiply `[T, 1, H]` by `[N, H]` to `[T, N]`, without a matrix product."""
    return emit.call("ReduceSum", emit.call("Mul", rows, weight), emit.integers(-1), keepdims=0)


def _within_top_p(
    emit: Emitter, route: RouteNode, logits: ir.Value, indices: ir.Value, used: ir.Value
) -> ir.Value:
    """Limit the used slots to the fewest whose cumulative router probability reaches top-p."""
    if not route.top_p:
        return used
    probabilities = router_probabilities(emit, route.rule, logits)
    chosen = emit.call("GatherElements", probabilities, indices, axis=1)
    cumulative = emit.call("CumSum", chosen, emit.integer(1), exclusive=1)
    return emit.call("And", emit.call("Less", cumulative, emit.number(route.top_p)), used)


def router_probabilities(emit: Emitter, rule: RouterRule, logits: ir.Value) -> ir.Value:
    """Compute router probabilities, as `edgemoe.models.routing.routers.probability_of`.

    Args:
        emit: Takes the nodes.
        rule: How experts are chosen.
        logits: float32 `[T, E]`.

    Returns:
        float32 `[T, E]`.
    """
    if rule.scoring in ("sigmoid", "sqrtsoftplus"):
        scores = _scores(emit, rule, logits)
        total = emit.call("ReduceSum", scores, emit.integers(-1), keepdims=1)
        return emit.call("Div", scores, total)
    return emit.call("Softmax", logits, axis=-1)


def where(emit: Emitter, condition: ir.Value, value: ir.Value, otherwise: float) -> ir.Value:
    """Return `value` where a condition holds, else a number."""
    return emit.call("Where", condition, value, emit.number(otherwise))


def sparsemixer(
    emit: Emitter, logits: ir.Value, jitter: float, top_k: int
) -> tuple[ir.Value, ir.Value]:
    """Choose experts one after the other, as `edgemoe.models.routing.routers.sparsemixer`.

    Args:
        emit: Takes the nodes.
        logits: float32 `[T, E]`.
        jitter: Width of the band, relative.
        top_k: Experts per token.

    Returns:
        Gates, float32 `[T, top_k]`, and expert ids, int64 `[T, top_k]`.
    """
    left, size = logits, emit.call("Abs", logits)
    low = emit.number(_LOW)
    gates, indices = [], []
    for _ in range(top_k):
        best, index = emit.call_many("TopK", 2, left, emit.integers(1), axis=-1)
        gap = emit.call("Div", emit.call("Sub", best, logits), emit.call("Max", size, best))
        far = emit.call("Greater", gap, emit.number(2 * jitter))
        near = emit.call("Softmax", emit.call("Where", far, low, left), axis=-1)
        gates.append(emit.call("GatherElements", near, index, axis=1))
        indices.append(index)
        lows = emit.call("Expand", low, emit.call("Shape", index))
        left = emit.call("ScatterElements", left, index, lows, axis=1)
    return emit.call("Concat", *gates, axis=1), emit.call("Concat", *indices, axis=1)


def _choose(
    emit: Emitter, route: RouteNode, logits: ir.Value, used: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    rule = route.rule
    if route.chosen is not None:
        return _weigh(emit, route, logits, route.chosen, used)
    shared: ir.Value | None = None
    if rule.shared:
        first, last = emit.integers(route.experts), emit.integers(route.experts + rule.shared)
        shared = emit.call("Slice", logits, first, last, emit.integers(1))
        shared = _scores(emit, rule, shared)
        logits = emit.call("Slice", logits, emit.integers(0), first, emit.integers(1))
    scores = _scores(emit, rule, logits)
    choice = _choice(emit, route, logits, scores)
    _, indices = emit.call_many("TopK", 2, choice, emit.integers(route.top_k), axis=-1)
    used = _within_top_p(emit, route, logits, indices, used)
    gates = emit.call("GatherElements", scores, indices, axis=1)
    if rule.softmax_of_chosen:
        gates = emit.call("Softmax", where(emit, used, gates, _LOW), axis=-1)
    gates = where(emit, used, gates, 0.0)
    if rule.renormalise and not rule.softmax_of_chosen:
        total = emit.call("ReduceSum", gates, emit.integers(-1), keepdims=1)
        if shared is not None:
            others = emit.call("ReduceSum", shared, emit.integers(-1), keepdims=1)
            total = emit.call("Add", total, others)
        if rule.sum_epsilon:
            total = emit.call("Add", total, emit.number(rule.sum_epsilon))
        gates = emit.call("Div", gates, total)
    return gates, indices, used


def _weigh(
    emit: Emitter, route: RouteNode, logits: ir.Value, chosen: ir.Value, used: ir.Value
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """Weigh what something else chose, the largest gate first."""
    gates = chosen_gates(emit, route.rule, logits, chosen)
    slots = emit.integers(route.top_k)
    gates, order = emit.call_many("TopK", 2, gates, slots, axis=-1)
    indices = emit.call("GatherElements", chosen, order, axis=1)
    return where(emit, used, gates, 0.0), indices, used


def chosen_gates(
    emit: Emitter, rule: RouterRule, logits: ir.Value, chosen: ir.Value
) -> ir.Value:
    """Compute the gates of experts that something else chose, without the rule's factor.

    Args:
        emit: Takes the nodes.
        rule: How gates follow from scores.
        logits: float32 `[T, E]`.
        chosen: int64 `[T, k]`.

    Returns:
        float32 `[T, k]`.
    """
    gates = emit.call("GatherElements", _scores(emit, rule, logits), chosen, axis=1)
    if rule.renormalise:
        total = emit.call("ReduceSum", gates, emit.integers(-1), keepdims=1)
        if rule.sum_epsilon:
            total = emit.call("Add", total, emit.number(rule.sum_epsilon))
        gates = emit.call("Div", gates, total)
    return gates


def _scores(emit: Emitter, rule: RouterRule, logits: ir.Value) -> ir.Value:
    if rule.scoring == "sigmoid":
        # In steps: a GPU's Sigmoid may be an approximate tanh, good to 11 bits only.
        decay = emit.call("Exp", emit.call("Neg", logits))
        one = emit.number(1.0)
        return emit.call("Div", one, emit.call("Add", one, decay))
    if rule.scoring == "sqrtsoftplus":
        return emit.call("Sqrt", emit.call("Softplus", logits))
    return logits if rule.softmax_of_chosen else emit.call("Softmax", logits, axis=-1)


def _choice(emit: Emitter, route: RouteNode, logits: ir.Value, scores: ir.Value) -> ir.Value:
    """Return the scores that experts are chosen by."""
    rule, bias = route.rule, route.correction_bias
    if not rule.limits_groups and bias is None:
        # The scores rise with the logits, and a GPU's fast exponential would round them.
        return logits
    choice = logits if rule.bias_on == "logits" else scores
    if bias is not None:
        choice = emit.call("Add", choice, bias)
    if not rule.limits_groups:
        return choice
    size = route.experts // rule.n_group
    grouped = emit.call("Reshape", choice, emit.integers(-1, rule.n_group, size))
    if rule.group_score == "top2":
        best, _ = emit.call_many("TopK", 2, grouped, emit.integers(2), axis=-1)
        group_scores = emit.call("ReduceSum", best, emit.integers(-1), keepdims=0)
    else:
        group_scores = emit.call("ReduceMax", grouped, emit.integers(-1), keepdims=0)
    kept, _ = emit.call_many("TopK", 2, group_scores, emit.integers(rule.topk_group), axis=-1)
    least = emit.call("ReduceMin", kept, emit.integers(-1), keepdims=1)
    allowed = emit.call("GreaterOrEqual", group_scores, least)
    allowed = emit.call("Unsqueeze", allowed, emit.integers(-1))
    masked = where(emit, allowed, grouped, max(rule.group_fill, _LOW))
    return emit.call("Reshape", masked, emit.integers(-1, route.experts))
