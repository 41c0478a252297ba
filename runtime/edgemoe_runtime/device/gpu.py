"""The GPU as its driver reports it; neither CUDA nor TensorRT need be installed."""

from __future__ import annotations

import ctypes
import sys

_LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
# CUdevice_attribute numbers of cuda.h
_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76


def compute_capability() -> int | None:
    """Return major * 10 + minor of the first GPU, or None without a driver or a device."""
    try:
        cuda = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(device), 0)
        or cuda.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
        or cuda.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    )
    return None if failed else major.value * 10 + minor.value
