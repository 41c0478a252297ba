"""Turn a Mixture-of-Experts model into graphs that run without torch.

    from edgemoe_exporters import ExportRequest, compile_bundle, export_bundle

    export_bundle(ExportRequest(model="moe", output="bundle", target="tensorrt-rtx"))
    compile_bundle("bundle", "tensorrt-rtx")

The model is traced once with custom ops (`tracing.trace`), then lowered for each engine by a
table, so that a graph fused for one engine is never given to another. Names are imported when
they are first used, so that `import edgemoe_exporters` costs no torch: `compile_bundle` runs on
devices that have none.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe_exporters.compiler.compile import compile_bundle
    from edgemoe_exporters.export import export_bundle
    from edgemoe_exporters.report import ExportReport
    from edgemoe_exporters.request import ExportRequest
    from edgemoe_exporters.targets import TARGETS

__all__ = ["TARGETS", "ExportReport", "ExportRequest", "compile_bundle", "export_bundle"]

_MODULES = {
    "TARGETS": "targets",
    "ExportReport": "report",
    "ExportRequest": "request",
    "compile_bundle": "compiler.compile",
    "export_bundle": "export",
}


def __getattr__(name: str) -> object:
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
