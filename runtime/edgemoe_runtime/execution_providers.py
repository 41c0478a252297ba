"""Execution providers of onnxruntime by name, and the version that computes them right."""

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

# the fused MoE of older versions silently uses another model's constants
# (microsoft/onnxruntime-genai#2062, fixed by microsoft/onnxruntime#28467)
MINIMUM_VERSION = (1, 28)
