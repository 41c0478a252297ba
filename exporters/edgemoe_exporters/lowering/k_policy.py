"""Bind a task's k policy to a traced graph, and count the experts that its tokens use.

One trace serves every task, so routers are traced without a policy; a Route node gets the
task's number of slots, top-p and allocator afterwards. Where k depends on the token, only the
graph knows how many experts a request used: a further output counts them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from edgemoe_exporters.graph.initializers import add_initializer
from edgemoe_exporters.graph.metadata import DOMAIN
from edgemoe_runtime.bundle.names import EXPERTS_USED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgemoe.k_policy import KPolicy
    from edgemoe.k_rule import KRule
    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import Plan


def full_k(model: MoeModel, *plans: Plan) -> tuple[int, ...]:
    """Return how many experts tokens may use when nothing caps them.

    Args:
        model: The whole model.
        plans: Plans of one or more tasks.

    Returns:
        For each MoE layer the most of any task: a cap above what a task uses is none.
    """
    tables = []
    for plan in plans:
        policy = plan.k_policy or model.k_policy
        own = [layer.top_k for layer in model.layers]
        tables.append(own if policy is None else [rule.slots for rule in policy.rules])
    return tuple(max(numbers) for numbers in zip(*tables, strict=True))


def has_policies(model: MoeModel, plans: Iterable[Plan]) -> bool:
    """Return whether tokens of any task may use another number than the router's top_k.

    Args:
        model: The whole model.
        plans: The plan of each task.

    Returns:
        Whether there is a policy.
    """
    policies = [model.k_policy, *(plan.k_policy for plan in plans)]
    return any(policy is not None for policy in policies)


def bind_policy(graph: ir.Model, policy: KPolicy | None) -> None:
    """Bind a policy to a traced graph.

    Args:
        graph: The graph, with Route nodes; it is changed.
        policy: The policy; None leaves the graph as it is.
    """
    if policy is None:
        return
    for node in _routes(graph):
        position = node.attributes["k_cap_index"].as_int()
        _bind_rule(graph.graph, node, policy.rules[position], policy.layers[position])


def count_experts_used(graph: ir.Model) -> None:
    """Add the output `experts_used`: experts that the tokens of a call used.

    Args:
        graph: The graph, with Route nodes, each of which gets a third output: the sum over the
            call's tokens, int64 `[1]`. The new output has them all, int64 `[MoE layers]`.
    """
    counts: dict[int, ir.Value] = {}
    # Of a layer that runs several times for a token, the last.
    last = {node.attributes["k_cap_index"].as_int(): node for node in _routes(graph)}
    for position, node in last.items():
        node.resize_outputs(3)
        count = node.outputs[2]
        count.name = f"{EXPERTS_USED}.{position}"
        count.type, count.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        counts[position] = count
    ordered = [counts[position] for position in sorted(counts)]
    joined = ir.node("Concat", ordered, {"axis": 0}, name=EXPERTS_USED)
    output = joined.outputs[0]
    output.name = EXPERTS_USED
    output.type, output.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([len(ordered)])
    graph.graph.append(joined)
    graph.graph.outputs.append(output)


def _routes(graph: ir.Model) -> Sequence[ir.Node]:
    return [n for n in graph.graph if n.domain == DOMAIN and n.op_type == "Route"]


def _bind_rule(graph: ir.Graph, node: ir.Node, rule: KRule, layer: int) -> None:
    changes: dict[str, int | float] = {"top_k": rule.slots, "top_p": rule.top_p or 0.0}
    for name, value in changes.items():
        (attribute,) = ir.convenience.convert_attributes({name: value})
        node.attributes[name] = attribute
    for output in node.outputs:
        assert output.shape is not None
        output.shape = ir.Shape([*list(output.shape)[:-1], rule.slots])
    if rule.allocator is None:
        return
    for part, numbers in (
        ("weight", rule.allocator[:, :-1]),
        ("bias", rule.allocator[:, -1]),
    ):
        name = f"allocator.{layer}.{part}"
        tensor = ir.tensor(np.ascontiguousarray(numbers), name=name)
        rows = add_initializer(graph, name, tensor)
        node.resize_inputs(len(node.inputs) + 1)
        node.replace_input_with(len(node.inputs) - 1, rows)
