"""The Python API that tensorrt and tensorrt_rtx share, and its differences."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from typing import Any

from edgemoe.errors import CompileError, MissingDependencyError

_LOG = logging.getLogger(__name__)

_REMEDY = {
    "tensorrt_rtx": (
        'Install it with `pip install "edgemoe[tensorrt-rtx]"` (x86-64, Linux or Windows; on a '
        "Jetson use --target jetson-orin or jetson-thor)."
    ),
    "tensorrt": (
        "On a Jetson it comes with JetPack (`sudo apt-get install python3-libnvinfer`): make "
        "the environment with `python3 -m venv --system-site-packages`. Elsewhere install "
        'it with `pip install "edgemoe[tensorrt]"`, which needs NVIDIA\'s package index; '
        "without a GPU use --target tensorrt-rtx."
    ),
}


@dataclass(frozen=True)
class TensorrtApi:
    """One of the two packages, imported.

    Attributes:
        package: `tensorrt` or `tensorrt_rtx`.
        module: The imported package; it has no type stubs.
    """

    package: str
    module: Any

    @property
    def version(self) -> str:
        """Version of the package, such as "10.3.0"."""
        return str(self.module.__version__)

    def make_log(self) -> Any:
        """Return a logger that keeps errors in its `errors` and hands warnings to logging.

        The builder reports by logging, and keeps a reference to its logger for its lifetime.
        """
        severity = self.module.ILogger.Severity
        # Without a GPU the driver is reported missing; TensorRT-RTX then builds all the same.
        noise = "CUDA driver version is insufficient" if self.builds_without_gpu else None
        bad = (severity.ERROR, severity.INTERNAL_ERROR)

        class Log(self.module.ILogger):  # type: ignore[misc,name-defined]  # no stubs
            def __init__(self) -> None:
                super().__init__()
                self.errors: list[str] = []

            def log(self, level: Any, message: str) -> None:
                if level in bad and not (noise and noise in message):
                    self.errors.append(message)
                elif level == severity.WARNING:
                    _LOG.debug(message)

        return Log()

    @property
    def builds_without_gpu(self) -> bool:
        """Whether engines can be built for a GPU that is not here."""
        return self.package == "tensorrt_rtx"

    def network_flags(self) -> int:
        """Return the creation flags of a strongly typed network.

        Strong typing is what keeps the router, norms and softmax in float32. From TensorRT
        11 on there is no other kind and the flag may be gone.
        """
        flag = getattr(self.module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return 0 if flag is None else 1 << int(flag)

    def set_capability(self, config: Any, compute_capability: int) -> None:
        """Make the builder build for one compute capability.

        Raises:
            CompileError: This version of TensorRT-RTX does not know it.
        """
        if not self.builds_without_gpu:
            return  # TensorRT builds for the GPU that is here
        known = self.module.ComputeCapability.__members__
        name = f"SM{compute_capability}"
        if name not in known:
            numbers = [item[2:] for item in known if item.startswith("SM")]
            raise CompileError(
                f"compute capability must be one that {self.package} {self.version} builds for "
                f"({', '.join(numbers)}), got {compute_capability}. Install a newer version."
            )
        config.num_compute_capabilities = 1
        config.set_compute_capability(known[name], 0)


def load_api(package: str) -> TensorrtApi:
    """Import a TensorRT package.

    Args:
        package: `tensorrt` or `tensorrt_rtx`.

    Raises:
        MissingDependencyError: It is not installed, or its libraries cannot be loaded.
    """
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        raise MissingDependencyError(
            f"package {package} must be installed to compile, got: {error}. {_REMEDY[package]}"
        ) from error
    return TensorrtApi(package, module)
