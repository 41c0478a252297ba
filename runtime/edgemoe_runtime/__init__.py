"""Run edgemoe bundles: no torch, no transformers, engines imported only when opened.

from edgemoe_runtime import Session

with Session.open("bundle", task="defects", deadline_ms=200) as session:
    answer = session.classify("Spindle vibration above limit", choices=["bearing", "none"])
    print(session.explain())
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe_runtime.adaptive_k.adaptation import KMove
    from edgemoe_runtime.adaptive_k.limits import Limits
    from edgemoe_runtime.bundle.integrity import VerifiedBundle, verify_bundle
    from edgemoe_runtime.bundle.manifest import Manifest
    from edgemoe_runtime.bundle.manifest_file import load_manifest
    from edgemoe_runtime.decoding.answers import Classification, Generation, Score
    from edgemoe_runtime.decoding.generation import TextStream
    from edgemoe_runtime.device.machine import Device, inspect_device
    from edgemoe_runtime.errors import (
        BackendError,
        BackendUnavailableError,
        BundleError,
        EdgemoeRuntimeError,
        IntegrityError,
        ManifestError,
        RequestError,
        SessionClosedError,
    )
    from edgemoe_runtime.explanation import Explanation
    from edgemoe_runtime.fallback import Fallback
    from edgemoe_runtime.session import Session

_MODULES = {
    "BackendError": "errors",
    "BackendUnavailableError": "errors",
    "BundleError": "errors",
    "Classification": "decoding.answers",
    "Device": "device.machine",
    "EdgemoeRuntimeError": "errors",
    "Explanation": "explanation",
    "Fallback": "fallback",
    "Generation": "decoding.answers",
    "IntegrityError": "errors",
    "KMove": "adaptive_k.adaptation",
    "Limits": "adaptive_k.limits",
    "Manifest": "bundle.manifest",
    "ManifestError": "errors",
    "RequestError": "errors",
    "Score": "decoding.answers",
    "Session": "session",
    "SessionClosedError": "errors",
    "TextStream": "decoding.generation",
    "VerifiedBundle": "bundle.integrity",
    "inspect_device": "device.machine",
    "load_manifest": "bundle.manifest_file",
    "verify_bundle": "bundle.integrity",
}

__all__ = [
    "BackendError",
    "BackendUnavailableError",
    "BundleError",
    "Classification",
    "Device",
    "EdgemoeRuntimeError",
    "Explanation",
    "Fallback",
    "Generation",
    "IntegrityError",
    "KMove",
    "Limits",
    "Manifest",
    "ManifestError",
    "RequestError",
    "Score",
    "Session",
    "SessionClosedError",
    "TextStream",
    "VerifiedBundle",
    "inspect_device",
    "load_manifest",
    "verify_bundle",
]

# Applications configure the log; without it, answers and explain() list the fall-backs.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> object:
    # imported on first use: a command that only prints its help need not load numpy
    if name in _MODULES:
        return getattr(importlib.import_module(f"edgemoe_runtime.{_MODULES[name]}"), name)
    raise AttributeError(f"module 'edgemoe_runtime' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
