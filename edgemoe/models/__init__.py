"""Families of Mixture-of-Experts models: the only place that knows transformers' classes."""

from __future__ import annotations

from edgemoe.models.adapter import adapt_model
from edgemoe.models.checkpoint import load_model, load_tokenizer, read_shape
from edgemoe.models.contract import MoeModel
from edgemoe.models.hooks import limit_k, observe
from edgemoe.models.layer import MoeLayer
from edgemoe.models.registry import FAMILIES
from edgemoe.models.router_rule import RouterRule
from edgemoe.models.routers import Routing, route
from edgemoe.models.saving import save_model
from edgemoe.models.shapes import LayerShape, ModelShape

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
