"""The choice of experts in plain ONNX, in float32 whatever the precision.

Two experts may differ by less than float16 resolves, so a rounded score picks the wrong one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edgemoe_exporters.ort.editor import Editor, array_of, required, size_of

if TYPE_CHECKING:
    import onnx_ir as ir

    from edgemoe_exporters.ort.precision import Precision

# What models add to the sum of sigmoid weights before they divide by it.
_SIGMOID_SUM_EPSILON = 1e-20


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
        scaling: What the weights have yet to be multiplied by.
    """

    experts: int
    indices: ir.Value
    logits: ir.Value | None
    raw: ir.Value
    sigmoid: bool
    sums_to_one: bool
    scaling: float

    def weights(self, editor: Editor, before: ir.Node) -> ir.Value:
        """Compute the weights without the scaling.

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
            if self.sigmoid:
                tiny = np.array(_SIGMOID_SUM_EPSILON, dtype=np.float32)
                total = editor.add(before, "Add", [total, editor.constant("tiny", tiny)])[0]
            (values,) = editor.add(before, "Div", [values, total])
        return values


def choose(
    editor: Editor, route: ir.Node, caps: tuple[ir.Value, ...], precision: Precision
) -> Choice:
    """Compute which experts each token uses.

    Args:
        editor: The graph.
        route: A Route node; what is added comes before it.
        caps: Most experts per token of each layer, in [1, top_k], int64 ``[1]``.
        precision: Says the type of the router's input.

    Returns:
        The choice.
    """
    attributes = route.attributes
    weight = required(route.inputs[1])
    experts = size_of(weight, 0)
    hidden = precision.to_float32(editor, route, required(route.inputs[0]))
    (logits,) = editor.add(route, "Gemm", [hidden, weight], {"transB": 1})
    sigmoid = attributes["scoring"].as_string() == "sigmoid"
    over_chosen = attributes["softmax_over"].as_string() == "top_k"
    renormalise = bool(attributes["renormalise"].as_int())
    bias = _bias(route)
    grouped = attributes["topk_group"].as_int() < attributes["n_group"].as_int()

    # Sigmoid and softmax keep the order, so logits choose as well as scores, but for scores
    # that are rounded to the same number: those tie, and the model takes the first.
    scores = choice_scores = logits
    plain_choice = bias is None and not grouped
    softmax_of_chosen = not sigmoid and (renormalise or over_chosen)
    if sigmoid and precision.is_exact:
        scores = choice_scores = _sigmoid(editor, route, logits)
    elif sigmoid and not plain_choice:
        (scores,) = (choice_scores,) = editor.add(route, "Sigmoid", [logits])
    elif not sigmoid and not over_chosen and not (plain_choice and softmax_of_chosen):
        (scores,) = (choice_scores,) = editor.add(route, "Softmax", [logits])
    if bias is not None:
        (choice_scores,) = editor.add(route, "Add", [scores, bias])
    if grouped:
        choice_scores = _mask_groups(editor, route, choice_scores, experts)
    cap = caps[attributes["k_cap_index"].as_int()]
    chosen, indices = editor.add(
        route, "TopK", [choice_scores, cap], {"axis": 1, "largest": 1, "sorted": 1}, outputs=2
    )
    if not plain_choice:
        source = logits if softmax_of_chosen else scores
        (chosen,) = editor.add(route, "GatherElements", [source, indices], {"axis": 1})
    return Choice(
        experts=experts,
        indices=indices,
        logits=chosen if softmax_of_chosen else None,
        raw=chosen,
        sigmoid=sigmoid and scores is logits,
        sums_to_one=renormalise or softmax_of_chosen,
        scaling=attributes["scaling_factor"].as_float(),
    )


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


def _bias(route: ir.Node) -> ir.Value | None:
    """Return the correction bias, unless it is the same for all experts."""
    bias = route.inputs[2]
    if bias is None or np.ptp(array_of(bias)) == 0:
        return None
    return bias


def _mask_groups(editor: Editor, route: ir.Node, scores: ir.Value, experts: int) -> ir.Value:
    """Set the scores outside the best groups to minus infinity.

    A group is as good as the sum of its two best scores.
    """
    groups = route.attributes["n_group"].as_int()
    kept = route.attributes["topk_group"].as_int()

    def ints(*numbers: int) -> ir.Value:
        name = "ints_" + "_".join(str(number).replace("-", "n") for number in numbers)
        return editor.constant(name, np.array(numbers, dtype=np.int64))

    (grouped,) = editor.add(route, "Reshape", [scores, ints(-1, groups, experts // groups)])
    best, _ = editor.add(route, "TopK", [grouped, ints(2)], {"axis": 2}, outputs=2)
    (sums,) = editor.add(route, "ReduceSum", [best, ints(2)], {"keepdims": 0})
    tops, _ = editor.add(route, "TopK", [sums, ints(kept)], {"axis": 1}, outputs=2)
    (worst,) = editor.add(route, "ReduceMin", [tops, ints(1)], {"keepdims": 1})
    (outside,) = editor.add(route, "Less", [sums, worst])
    (outside,) = editor.add(route, "Unsqueeze", [outside, ints(2)])
    low = editor.constant("minus_infinity", np.array(-np.inf, dtype=np.float32))
    (masked,) = editor.add(route, "Where", [outside, low, grouped])
    (flat,) = editor.add(route, "Reshape", [masked, ints(-1, experts)])
    return flat
