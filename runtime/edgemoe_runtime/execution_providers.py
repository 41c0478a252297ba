"""Execution providers of onnxruntime by name, and the release that runs every bundle."""

from __future__ import annotations

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
TENSORRT_RTX = "NvTensorRTRTXExecutionProvider"

PROVIDERS: dict[str, tuple[str, ...]] = {
    # what takes the nodes that the provider itself declines
    CPU: (),
    CUDA: (CPU,),
    TENSORRT: (CUDA, CPU),
    TENSORRT_RTX: (CPU,),
}
PROVIDER_NAMES: dict[str, str] = {
    "cpu": CPU,
    "cuda": CUDA,
    "tensorrt": TENSORRT,
    "tensorrt-rtx": TENSORRT_RTX,
}

# the release that runs every bundle, and that pyproject.toml asks for; a bundle whose graphs
# need less says so in its manifest (needs_onnxruntime)
MINIMUM_VERSION = (1, 31)


def release_numbers(version: str) -> tuple[int, ...]:
    """Return major and minor number of a version of onnxruntime, such as "1.31.1".

    Args:
        version: what the package or a manifest says.
    """
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
