"""Read the Route and Experts nodes of a traced graph; for the lowerings of both flavours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import torch

from edgemoe.models.activation import Activation
from edgemoe.models.experts import ExpertsLayout
from edgemoe.models.routing.rule import RouterRule, Scoring
from edgemoe_exporters.graph.editor import required
from edgemoe_exporters.graph.initializers import weight_of
from edgemoe_exporters.graph.lazy_weights import LazyWeight

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class RouteNode:
    """A Route node.

    Attributes:
        hidden: float `[T, H]`.
        weight: Router rows, float `[E, H]`, and the rule's further rows; the biases with an
            entry for each of its idle choices.
        logit_bias: float `[E]`.
        correction_bias: float `[E]`, where it is not the same for all experts.
        expert_scale: float `[E]`.
        chosen: Experts that the token's id chooses, int64 `[T, top_k]`.
        k_cap: int64 `[L]`.
        k_cap_index: Which element of `k_cap` is this layer's.
        top_k: Most experts of a token without a cap.
        rule: How experts are chosen.
        top_p: Cumulative router probability that a token's experts must reach; 0 for no limit.
        allocator: Weights of the linear head that sets a token's k, float32 `[top_k, H]`.
        allocator_bias: Bias of that head, float32 `[top_k]`.
        counts: Whether it also outputs how many experts its tokens use.
    """

    hidden: ir.Value
    weight: ir.Value
    logit_bias: ir.Value | None
    correction_bias: ir.Value | None
    expert_scale: ir.Value | None
    chosen: ir.Value | None
    k_cap: ir.Value
    k_cap_index: int
    top_k: int
    rule: RouterRule
    top_p: float = 0.0
    allocator: ir.Value | None = None
    allocator_bias: ir.Value | None = None
    counts: bool = False

    @classmethod
    def of(cls, node: ir.Node) -> RouteNode:
        """Read a node."""
        # Inputs after the cap were added by a k policy.
        hidden, weight, logit_bias, correction, scale, chosen, k_cap, *rest = node.inputs
        attributes = node.attributes
        top_p = attributes.get("top_p")
        if correction is not None and np.ptp(weight_of(correction)) == 0:
            correction = None
        assert hidden is not None
        assert weight is not None
        assert k_cap is not None
        return cls(
            hidden=hidden,
            weight=weight,
            logit_bias=logit_bias,
            correction_bias=correction,
            expert_scale=scale,
            chosen=chosen,
            k_cap=k_cap,
            k_cap_index=attributes["k_cap_index"].as_int(),
            top_k=attributes["top_k"].as_int(),
            top_p=0.0 if top_p is None else top_p.as_float(),
            allocator=rest[0] if rest else None,
            allocator_bias=rest[1] if rest else None,
            counts=len(node.outputs) > 2,
            rule=RouterRule(
                scoring=cast("Scoring", attributes["scoring"].as_string()),
                softmax_over=cast(
                    "Literal['all', 'top_k']", attributes["softmax_over"].as_string()
                ),
                renormalise=bool(attributes["renormalise"].as_int()),
                sum_epsilon=attributes["sum_epsilon"].as_float(),
                scaling_factor=attributes["scaling_factor"].as_float(),
                bias_on=cast("Literal['scores', 'logits']", attributes["bias_on"].as_string()),
                n_group=attributes["n_group"].as_int(),
                topk_group=attributes["topk_group"].as_int(),
                group_score=cast(
                    "Literal['top2', 'max']", attributes["group_score"].as_string()
                ),
                group_fill=attributes["group_fill"].as_float(),
                jitter=attributes["jitter"].as_float(),
                idle=attributes["idle"].as_int(),
                shared=attributes["shared"].as_int(),
            ),
        )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return LazyWeight.of(self.weight).shape[0] - self.rule.further_rows


def activation_of(node: ir.Node) -> Activation:
    """Read the activation between the two products of Experts or FactoredExperts."""
    attributes = node.attributes
    return Activation(
        kind=attributes["activation"].as_string(),
        gated=bool(attributes["gated"].as_int()),
        alpha=attributes["alpha"].as_float(),
        beta=attributes["beta"].as_float(),
        limit=attributes["limit"].as_float(),
        gate_softcap=attributes["gate_softcap"].as_float(),
        up_softcap=attributes["up_softcap"].as_float(),
    )


@dataclass(frozen=True)
class ExpertsNode:
    """An Experts node.

    Attributes:
        hidden: float `[T, H]`.
        indices: int64 `[T, k]`.
        weights: float `[T, k]`.
        gate_up: First product, as the family stores it.
        down: Second product, as the family stores it.
        gate_up_bias: float `[E, 2I]`.
        down_bias: float `[E, H]`.
        layout: How the family stores them.
        activation: The activation between the two products.
    """

    hidden: ir.Value
    indices: ir.Value
    weights: ir.Value
    gate_up: ir.Value
    down: ir.Value
    gate_up_bias: ir.Value | None
    down_bias: ir.Value | None
    layout: ExpertsLayout
    activation: Activation

    @classmethod
    def of(cls, node: ir.Node) -> ExpertsNode:
        """Read a node."""
        hidden, indices, weights, gate_up, down, *biases = node.inputs
        first, second = (*biases, None, None)[:2]
        attributes = node.attributes
        gated = bool(attributes["gated"].as_int())
        return cls(
            hidden=required(hidden),
            indices=required(indices),
            weights=required(weights),
            gate_up=required(gate_up),
            down=required(down),
            gate_up_bias=first,
            down_bias=second,
            layout=ExpertsLayout(
                has_gate=gated,
                has_bias=first is not None,
                is_transposed=bool(attributes["is_transposed"].as_int()),
                is_concatenated=bool(attributes["is_concatenated"].as_int()),
            ),
            activation=activation_of(node),
        )

    def gate_up_array(self) -> LazyWeight:
        """Return gate rows, then up rows `[E, 2I, H]`; up rows only without a gate."""
        return self._canonical(self.layout.gate_up_name, self.gate_up)

    def down_array(self) -> LazyWeight:
        """Return `[E, H, I]`."""
        return self._canonical("down_proj", self.down)

    def gate_up_bias_array(self) -> LazyWeight | None:
        """Return `[E, 2I]`, where there is one."""
        if self.gate_up_bias is None:
            return None
        return self._canonical(f"{self.layout.gate_up_name}_bias", self.gate_up_bias)

    def down_bias_array(self) -> LazyWeight | None:
        """Return `[E, H]`, where there is one."""
        return None if self.down_bias is None else LazyWeight.of(self.down_bias)

    def _canonical(self, name: str, value: ir.Value) -> LazyWeight:
        stored, layout = LazyWeight.of(value), self.layout
        if layout.is_canonical:
            return stored

        def convert(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
            tensor = layout.to_canonical(name, torch.from_numpy(np.ascontiguousarray(array)))
            found: np.ndarray[Any, Any] = tensor.numpy()
            return found

        shape = layout.to_canonical(name, torch.empty(stored.shape, device="meta")).shape
        return stored.map(convert, shape)
