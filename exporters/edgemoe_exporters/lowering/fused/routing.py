"""The choice of experts in plain ONNX, in float32 whatever the precision.

Two experts may differ by less than float16 resolves, so a rounded score picks the wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.graph.builder import FLOAT32, Emitter
from edgemoe_exporters.lowering.primitive.routing import (
    chosen_gates,
    router_probabilities,
    sparsemixer,
)

if TYPE_CHECKING:
    from edgemoe_exporters.graph.editor import Editor
    from edgemoe_exporters.graph.nodes import RouteNode
    from edgemoe_exporters.precision import Precision


_INT64 = ir.DataType.INT64


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The experts of each token; n is the number of experts that the cap leaves.

    Attributes:
        experts: Number of experts of the layer.
        idle: Number of choices after them that stand for none.
        shared: Sum of the scores of experts that every token uses, float32 `[T, 1]`: part of
            the sum that weights are divided by.
        indices: Their ids, int64 `[T, n]`.
        used: Which of them the token uses, bool `[T, n]`; None where it uses all.
        logits: float32 `[T, n]` whose softmax is the weights, where there is such.
        raw: float32 `[T, n]`: the scores, or logits for sigmoid scores, of the chosen.
        sigmoid: Whether `raw` still has to pass through a sigmoid.
        sums_to_one: Whether the weights are divided by their sum.
        sum_epsilon: What is added to that sum.
    """

    experts: int
    indices: ir.Value
    logits: ir.Value | None
    raw: ir.Value
    sigmoid: bool = False
    sums_to_one: bool = False
    sum_epsilon: float = 0.0
    used: ir.Value | None = None
    idle: int = 0
    shared: ir.Value | None = None

    def weights(self, editor: Editor, before: ir.Node) -> ir.Value:
        """Compute the gates, without the factor of each expert.

        Args:
            editor: The graph.
            before: The node that they come before.

        Returns:
            float32 `[T, n]`.
        """
        values = self.raw
        if self.sigmoid:
            (values,) = editor.add(before, "Sigmoid", [values])
        if self.used is not None:
            zero = editor.constant("zero", np.array(0, dtype=np.float32))
            (values,) = editor.add(before, "Where", [self.used, values, zero])
        if self.sums_to_one:
            axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
            (total,) = editor.add(before, "ReduceSum", [values, axis], {"keepdims": 1})
            if self.shared is not None:
                (total,) = editor.add(before, "Add", [total, self.shared])
            if self.sum_epsilon:
                tiny = np.array(self.sum_epsilon, dtype=np.float32)
                name = f"epsilon_{self.sum_epsilon:g}"
                total = editor.add(before, "Add", [total, editor.constant(name, tiny)])[0]
            (values,) = editor.add(before, "Div", [values, total])
        return values

    def count(self, editor: Editor, before: ir.Node, cap: ir.Value) -> ir.Value:
        """Count the experts that the tokens use together.

        Args:
            editor: The graph.
            before: The node that it comes before.
            cap: n, int64 `[1]`.

        Returns:
            int64 `[1]`.
        """
        if self.used is None:
            (tokens,) = editor.add(before, "Shape", [self.indices], {"start": 0, "end": 1})
            return editor.add(before, "Mul", [tokens, cap])[0]
        (ones,) = editor.add(before, "Cast", [self.used], {"to": int(_INT64)})
        flat = editor.constant("ints_n1", np.array([-1], dtype=np.int64))
        (ones,) = editor.add(before, "Reshape", [ones, flat])
        return editor.add(before, "ReduceSum", [ones], {"keepdims": 1})[0]


def choose(
    editor: Editor,
    node: ir.Node,
    route: RouteNode,
    caps: tuple[ir.Value, ...],
    precision: Precision,
) -> Choice:
    """Compute which experts each token uses.

    Args:
        editor: The graph.
        node: A Route node; what is added comes before it.
        route: The same, read.
        caps: Most experts per token of each layer, in [1, top_k], int64 `[1]`.
        precision: Gives the type of the router's input.

    Returns:
        The choice.
    """
    rule, bias = route.rule, route.correction_bias
    cap = caps[route.k_cap_index]
    hidden = precision.to_float32(editor, node, route.hidden)
    inputs = [hidden, route.weight]
    if route.logit_bias is not None:
        inputs.append(route.logit_bias)
    (logits,) = editor.add(node, "Gemm", inputs, {"transB": 1})
    if route.chosen is not None:
        return _weigh(editor, node, route, route.chosen, logits, cap)
    if rule.scoring == "sparsemixer":
        return _mix(editor, node, route, hidden, logits, cap)
    shared: ir.Value | None = None
    if rule.shared:
        sizes = np.array([route.experts, rule.shared], dtype=np.int64)
        split = editor.constant(f"split_{route.experts}_{rule.shared}", sizes)
        logits, rest = editor.add(node, "Split", [logits, split], {"axis": 1}, outputs=2)
        axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
        scored = [_sigmoid(editor, node, rest), axis]
        (shared,) = editor.add(node, "ReduceSum", scored, {"keepdims": 1})
    sigmoid = rule.scoring == "sigmoid"
    # Sigmoid and softmax are monotonic, so logits choose as scores do, except for scores that
    # round to the same number: those tie, and the model takes the first.
    scores = choice_scores = logits
    plain_choice = bias is None and not rule.limits_groups
    softmax_of_chosen = rule.scoring == "softmax" and (
        rule.softmax_over == "top_k" or (rule.renormalise and not rule.sum_epsilon)
    )
    if sigmoid and precision.is_exact:
        scores = choice_scores = _sigmoid(editor, node, logits)
    elif sigmoid and not plain_choice:
        (scores,) = (choice_scores,) = editor.add(node, "Sigmoid", [logits])
    elif rule.scoring == "sqrtsoftplus":
        (soft,) = editor.add(node, "Softplus", [logits])
        (scores,) = (choice_scores,) = editor.add(node, "Sqrt", [soft])
    elif rule.scoring == "softmax" and not (
        rule.softmax_over == "top_k" or (plain_choice and softmax_of_chosen)
    ):
        (scores,) = (choice_scores,) = editor.add(node, "Softmax", [logits])
    if rule.bias_on == "logits":
        choice_scores = logits
    if bias is not None:
        (choice_scores,) = editor.add(node, "Add", [choice_scores, bias])
    if rule.limits_groups:
        choice_scores = _mask_groups(editor, node, route, choice_scores)
    chosen, indices = editor.add(
        node, "TopK", [choice_scores, cap], {"axis": 1, "largest": 1, "sorted": 1}, outputs=2
    )
    source = logits if softmax_of_chosen else scores
    if not plain_choice or source is not choice_scores:
        (chosen,) = editor.add(node, "GatherElements", [source, indices], {"axis": 1})
    used = _used(editor, node, route, hidden, logits, indices, cap)
    kept = chosen
    if used is not None and softmax_of_chosen:
        low = editor.constant("minus_infinity", np.array(-np.inf, dtype=np.float32))
        (kept,) = editor.add(node, "Where", [used, chosen, low])
    return Choice(
        experts=route.experts,
        indices=indices,
        used=used,
        idle=rule.idle,
        shared=shared,
        logits=kept if softmax_of_chosen else None,
        raw=chosen,
        sigmoid=sigmoid and scores is logits,
        sums_to_one=rule.renormalise or softmax_of_chosen,
        sum_epsilon=rule.sum_epsilon,
    )


def _used(
    editor: Editor,
    node: ir.Node,
    route: RouteNode,
    hidden: ir.Value,
    logits: ir.Value,
    indices: ir.Value,
    cap: ir.Value,
) -> ir.Value | None:
    """Compute which of the chosen experts a token uses; None where only a cap limits them."""
    used: ir.Value | None = None
    if route.allocator is not None:
        inputs = [hidden, route.allocator, route.allocator_bias]
        (scores,) = editor.add(node, "Gemm", inputs, {"transB": 1})
        (last,) = editor.add(node, "ArgMax", [scores], {"axis": 1, "keepdims": 1})
        ranks = editor.constant(f"places_{route.top_k}", np.arange(route.top_k, dtype=np.int64))
        zero = editor.constant("ints_0", np.array([0], dtype=np.int64))
        (ranks,) = editor.add(node, "Slice", [ranks, zero, cap])
        (used,) = editor.add(node, "LessOrEqual", [ranks, last])
    if route.top_p:
        emit = Emitter(editor.graph, FLOAT32, f"{node.name}/mass")
        probabilities = router_probabilities(emit, route.rule, logits)
        editor.graph.insert_before(node, emit.nodes)
        (probabilities,) = editor.add(
            node, "GatherElements", [probabilities, indices], {"axis": 1}
        )
        axis = editor.constant("one_int64", np.array(1, dtype=np.int64))
        (cumulative,) = editor.add(node, "CumSum", [probabilities, axis], {"exclusive": 1})
        share = editor.constant(
            f"share_{route.top_p!r}", np.array(route.top_p, dtype=np.float32)
        )
        (wanted,) = editor.add(node, "Less", [cumulative, share])
        used = wanted if used is None else editor.add(node, "And", [wanted, used])[0]
    if route.rule.idle:
        first = editor.constant("ints_" + str(route.experts), np.array([route.experts]))
        (taken,) = editor.add(node, "Less", [indices, first])
        used = taken if used is None else editor.add(node, "And", [taken, used])[0]
    return used


def _mix(
    editor: Editor,
    node: ir.Node,
    route: RouteNode,
    hidden: ir.Value,
    logits: ir.Value,
    cap: ir.Value,
) -> Choice:
    emit = Emitter(editor.graph, FLOAT32, f"{node.name}/mix")
    gates, indices = sparsemixer(emit, logits, route.rule.jitter, route.top_k)
    editor.graph.insert_before(node, emit.nodes)
    axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
    zero = editor.constant("ints_0", np.array([0], dtype=np.int64))
    (gates,) = editor.add(node, "Slice", [gates, zero, cap, axis])
    (indices,) = editor.add(node, "Slice", [indices, zero, cap, axis])
    used = _used(editor, node, route, hidden, logits, indices, cap)
    return Choice(experts=route.experts, indices=indices, logits=None, raw=gates, used=used)


def _weigh(
    editor: Editor,
    node: ir.Node,
    route: RouteNode,
    chosen: ir.Value,
    logits: ir.Value,
    cap: ir.Value,
) -> Choice:
    emit = Emitter(editor.graph, FLOAT32, f"{node.name}/weigh")
    gates = chosen_gates(emit, route.rule, logits, chosen)
    editor.graph.insert_before(node, emit.nodes)
    gates, places = editor.add(
        node, "TopK", [gates, cap], {"axis": 1, "largest": 1, "sorted": 1}, outputs=2
    )
    (indices,) = editor.add(node, "GatherElements", [chosen, places], {"axis": 1})
    return Choice(experts=route.experts, indices=indices, logits=None, raw=gates)


def _sigmoid(editor: Editor, before: ir.Node, logits: ir.Value) -> ir.Value:
    """Compute `1 / (1 + exp(-x))` step by step, which rounds as torch does.

    The fused op differs from torch in the last bit of every third score, enough to choose
    another expert now and then.
    """
    (negative,) = editor.add(before, "Neg", [logits])
    (power,) = editor.add(before, "Exp", [negative])
    one = editor.constant("one", np.array(1, dtype=np.float32))
    (denominator,) = editor.add(before, "Add", [power, one])
    return editor.add(before, "Div", [one, denominator])[0]


def _mask_groups(editor: Editor, node: ir.Node, route: RouteNode, scores: ir.Value) -> ir.Value:
    """Mask the scores of experts outside the best groups."""
    rule, experts = route.rule, route.experts

    def ints(*numbers: int) -> ir.Value:
        name = "ints_" + "_".join(str(number).replace("-", "n") for number in numbers)
        return editor.constant(name, np.array(numbers, dtype=np.int64))

    shape = ints(-1, rule.n_group, experts // rule.n_group)
    (grouped,) = editor.add(node, "Reshape", [scores, shape])
    if rule.group_score == "top2":
        best, _ = editor.add(node, "TopK", [grouped, ints(2)], {"axis": 2}, outputs=2)
        (ranks,) = editor.add(node, "ReduceSum", [best, ints(2)], {"keepdims": 0})
    else:
        (ranks,) = editor.add(node, "ReduceMax", [grouped, ints(2)], {"keepdims": 0})
    tops, _ = editor.add(node, "TopK", [ranks, ints(rule.topk_group)], {"axis": 1}, outputs=2)
    (worst,) = editor.add(node, "ReduceMin", [tops, ints(1)], {"keepdims": 1})
    (outside,) = editor.add(node, "Less", [ranks, worst])
    (outside,) = editor.add(node, "Unsqueeze", [outside, ints(2)])
    name = "minus_infinity" if np.isinf(rule.group_fill) else f"fill_{rule.group_fill:g}"
    fill = editor.constant(name, np.array(rule.group_fill, dtype=np.float32))
    (masked,) = editor.add(node, "Where", [outside, fill, grouped])
    return editor.add(node, "Reshape", [masked, ints(-1, experts)])[0]
