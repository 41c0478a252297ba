"""The plan that changes nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from edgemoe.models.shapes import ModelShape

KEEP_ALL = "none"


def keep_all(shape: ModelShape) -> Plan:
    """Return the plan that changes nothing.

    Args:
        shape: The model.

    Returns:
        A plan that keeps every expert of every layer.
    """
    return Plan(
        method=KEEP_ALL,
        layers=tuple(
            LayerPlan(
                layer=layer.layer,
                experts=tuple(
                    MergedExpert(members=(expert,)) for expert in range(layer.num_experts)
                ),
            )
            for layer in shape.layers
        ),
    )
