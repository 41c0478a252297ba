"""Families of Mixture-of-Experts models: the only place that knows transformers' classes.

Names are imported on first use: shapes, statistics and what a file holds cost no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe.models.adapter import adapt_model
    from edgemoe.models.checkpoint import load_model, load_tokenizer, read_shape
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.hooks import limit_k, observe
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.registry import FAMILIES
    from edgemoe.models.routing.routers import Routing, route
    from edgemoe.models.routing.rule import RouterRule
    from edgemoe.models.saving import save_model
    from edgemoe.models.shapes import LayerShape, ModelShape

_MODULES = {
    "FAMILIES": "registry",
    "LayerShape": "shapes",
    "ModelShape": "shapes",
    "MoeLayer": "layers.layer",
    "MoeModel": "contract",
    "RouterRule": "routing.rule",
    "Routing": "routing.routers",
    "adapt_model": "adapter",
    "limit_k": "hooks",
    "load_model": "checkpoint",
    "load_tokenizer": "checkpoint",
    "observe": "hooks",
    "read_shape": "checkpoint",
    "route": "routing.routers",
    "save_model": "saving",
}

__all__ = [
    "FAMILIES",
    "LayerShape",
    "ModelShape",
    "MoeLayer",
    "MoeModel",
    "RouterRule",
    "Routing",
    "adapt_model",
    "limit_k",
    "load_model",
    "load_tokenizer",
    "observe",
    "read_shape",
    "route",
    "save_model",
]


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"edgemoe.models.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'edgemoe.models' has no attribute {name!r}")
