"""The choice of experts in plain ONNX, in float32 whatever the precision.

Two experts may differ by less than float16 resolves, so a rounded score picks the wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe_exporters.lower_tensorrt_emit import FLOAT32, Emitter
from edgemoe_exporters.lower_tensorrt_route import sparsemixer

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe_exporters.nodes import RouteNode
    from edgemoe_exporters.ort.editor import Editor
    from edgemoe_exporters.ort.precision import Precision


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The experts of each token; n is the number of experts that the cap leaves.

    Attributes:
        experts: Number of experts of the layer.
        indices: Their ids, int64 ``[T, n]``.
        logits: float32 ``[T, n]`` whose softmax is the weights, where there is such.
        raw: float32 ``[T, n]``: the scores, or logits for sigmoid scores, of the chosen.
        sigmoid: Whether ``raw`` still has to pass through a sigmoid.
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

    def weights(self, editor: Editor, before: ir.Node) -> ir.Value:
        """Compute the weights without what scales each expert.

        Args:
            editor: The graph.
            before: The node that they come before.

        Returns:
            float32 ``[T, n]``.
        """
        values = self.raw
        if self.sigmoid:
            (values,) = editor.add(before, "Sigmoid", [values])
        if self.sums_to_one:
            axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
            (total,) = editor.add(before, "ReduceSum", [values, axis], {"keepdims": 1})
            if self.sum_epsilon:
                tiny = np.array(self.sum_epsilon, dtype=np.float32)
                name = f"epsilon_{self.sum_epsilon:g}"
                total = editor.add(before, "Add", [total, editor.constant(name, tiny)])[0]
            (values,) = editor.add(before, "Div", [values, total])
        return values


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
        caps: Most experts per token of each layer, in [1, top_k], int64 ``[1]``.
        precision: Says the type of the router's input.

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
    if rule.scoring == "sparsemixer":
        return _mix(editor, node, route, logits, cap)
    sigmoid = rule.scoring == "sigmoid"
    # Sigmoid and softmax keep the order, so logits choose as well as scores, but for scores
    # that are rounded to the same number: those tie, and the model takes the first.
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
    return Choice(
        experts=route.experts,
        indices=indices,
        logits=chosen if softmax_of_chosen else None,
        raw=chosen,
        sigmoid=sigmoid and scores is logits,
        sums_to_one=rule.renormalise or softmax_of_chosen,
        sum_epsilon=rule.sum_epsilon,
    )


def _mix(
    editor: Editor, node: ir.Node, route: RouteNode, logits: ir.Value, cap: ir.Value
) -> Choice:
    emit = Emitter(editor.graph, FLOAT32, f"{node.name}/mix")
    gates, indices = sparsemixer(emit, logits, route.rule.jitter, route.top_k)
    editor.graph.insert_before(node, emit.nodes)
    axis = editor.constant("ints_1", np.array([1], dtype=np.int64))
    zero = editor.constant("ints_0", np.array([0], dtype=np.int64))
    (gates,) = editor.add(node, "Slice", [gates, zero, cap, axis])
    (indices,) = editor.add(node, "Slice", [indices, zero, cap, axis])
    return Choice(experts=route.experts, indices=indices, logits=None, raw=gates)


def _sigmoid(editor: Editor, before: ir.Node, logits: ir.Value) -> ir.Value:
    """Compute ``1 / (1 + exp(-x))`` step by step, which rounds as torch does.

    The fused op differs from torch in the last bit of every third score, enough to choose
    another expert now and then.
    """
    (negative,) = editor.add(before, "Neg", [logits])
    (power,) = editor.add(before, "Exp", [negative])
    one = editor.constant("one", np.array(1, dtype=np.float32))
    (denominator,) = editor.add(before, "Add", [power, one])
    return editor.add(before, "Div", [one, denominator])[0]


def _mask_groups(editor: Editor, node: ir.Node, route: RouteNode, scores: ir.Value) -> ir.Value:
    """Put the experts outside the best groups out of reach."""
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
