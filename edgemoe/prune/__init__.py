"""Which experts stay: methods decide from statistics, plans record it, apply carries it out.

Importing this package, or `edgemoe.plans.plan`, costs no torch.
"""

from __future__ import annotations

from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan

__all__ = ["LayerPlan", "MergedExpert", "Plan"]
