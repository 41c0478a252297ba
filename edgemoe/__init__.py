"""Fit Mixture-of-Experts language models to one task and one edge device.

    from edgemoe import apply_plan, calibrate, prune

    statistics = calibrate("moe", {"code": "code.jsonl"})
    plan = prune("moe", statistics, "code", "reap", keep=0.5)
    apply_plan("moe", plan, "moe-code")

The functions are the commands of `edgemoe`, one for one. They are imported when they are first
named, so that `import edgemoe` costs no torch; a device needs only `edgemoe_runtime`,
which never imports this package.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING

from edgemoe.versions import __version__ as __version__

if TYPE_CHECKING:
    from edgemoe.api.allocate import allocate
    from edgemoe.api.apply_plan import apply_plan
    from edgemoe.api.calibrate import calibrate
    from edgemoe.api.decompose import decompose
    from edgemoe.api.evaluate import evaluate
    from edgemoe.api.load_model import load_model
    from edgemoe.api.prune import prune
    from edgemoe.api.recover import recover
    from edgemoe.api.sweep import sweep
    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile

__all__ = [
    "Plan",
    "Statistics",
    "TaskFile",
    "allocate",
    "apply_plan",
    "calibrate",
    "decompose",
    "evaluate",
    "load_model",
    "prune",
    "recover",
    "sweep",
]

_MODULES = {
    "Plan": "edgemoe.plans.plan",
    "Statistics": "edgemoe.calibrate.statistics",
    "TaskFile": "edgemoe.tasks",
}
# Verbs that are packages too; why the name is the function's, edgemoe.api explains.
_PACKAGES = ("allocate", "calibrate", "decompose", "evaluate", "prune", "recover", "sweep")


class _FrontDoor(ModuleType):
    """This module, whose verbs stay functions when the packages of their names are imported."""

    def __setattr__(self, name: str, value: object) -> None:
        # The import system binds each package that it has imported here.
        if not (name in _PACKAGES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor


if not TYPE_CHECKING:  # a type checker that saw it would let every name pass

    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = importlib.import_module(_MODULES.get(name, f"{__name__}.api.{name}"))
        found = getattr(module, name)
        if name in _PACKAGES:
            # One namespace: what is imported into the package is found at the function too.
            found.__dict__ = importlib.import_module(f"{__name__}.{name}").__dict__
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
