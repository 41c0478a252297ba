"""Which experts stay: methods decide from statistics, plans record it, apply carries it out.

Importing this package, or :mod:`edgemoe.prune.plan`, costs no torch.
"""

from __future__ import annotations

from edgemoe.prune.plan import LayerPlan, MergedExpert, Plan

__all__ = ["LayerPlan", "MergedExpert", "Plan"]
