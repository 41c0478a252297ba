"""The backends by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe_runtime.backends.onnxruntime import open_onnxruntime
from edgemoe_runtime.backends.tensorrt import open_tensorrt, open_tensorrt_rtx

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe_runtime.backends.base import Backend, OpenRequest

BACKENDS: dict[str, Callable[[OpenRequest], Backend]] = {
    "onnxruntime": open_onnxruntime,
    "tensorrt": open_tensorrt,
    "tensorrt_rtx": open_tensorrt_rtx,
}
