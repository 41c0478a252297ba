"""The few calls of the CUDA runtime that an engine needs, through ctypes.

Only `libcudart` is needed, which JetPack and the CUDA toolkit bring; torch and cupy are not.
Never run on a device by the project's own tests: there is no GPU where they run.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    import numpy as np

_LIBRARIES = ("libcudart.so", "libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0")
_HOST_TO_DEVICE, _DEVICE_TO_HOST = 1, 2
_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE = 75, 76  # cudaDevAttrComputeCapabilityMajor and Minor


class CudaRuntime:
    """The CUDA runtime of one device."""

    def __init__(self) -> None:
        self._library = _load_library()
        count = ctypes.c_int(0)
        status = int(self._library.cudaGetDeviceCount(ctypes.byref(count)))
        if status != 0 or count.value < 1:
            raise BackendUnavailableError(
                f"no CUDA device answers (cudaGetDeviceCount says {self._message(status)});"
                " check the driver with nvidia-smi, or tegrastats on a Jetson"
            )

    def compute_capability(self) -> int:
        """Return major * 10 + minor of device 0."""
        values: list[int] = []
        for attribute in (_MAJOR_ATTRIBUTE, _MINOR_ATTRIBUTE):
            value = ctypes.c_int(0)
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            values.append(value.value)
        return values[0] * 10 + values[1]

    def create_stream(self) -> int:
        """Return the handle of a new stream."""
        stream = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(stream))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream."""
        self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronise(self, stream: int) -> None:
        """Wait until the stream's work is done."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def allocate(self, size_bytes: int) -> int:
        """Return the address of new, zeroed device memory."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), ctypes.c_size_t(size_bytes))
        self._call("cudaMemset", address, 0, ctypes.c_size_t(size_bytes))
        return address.value or 0

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        """Set device memory to zero."""
        self._call(
            "cudaMemsetAsync",
            ctypes.c_void_p(address),
            0,
            ctypes.c_size_t(size_bytes),
            ctypes.c_void_p(stream),
        )

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", ctypes.c_void_p(address))

    def upload(self, address: int, array: np.ndarray[Any, Any], stream: int) -> None:
        """Copy a contiguous array to the device; it must live until the stream is done."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(address),
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_size_t(array.nbytes),
            _HOST_TO_DEVICE,
            ctypes.c_void_p(stream),
        )

    def download(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        """Copy from the device into a contiguous array; valid once the stream is done."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(array.ctypes.data),
            ctypes.c_void_p(address),
            ctypes.c_size_t(array.nbytes),
            _DEVICE_TO_HOST,
            ctypes.c_void_p(stream),
        )

    def _call(self, function: str, *arguments: object) -> None:
        status = int(getattr(self._library, function)(*arguments))
        if status != 0:
            raise BackendError(
                f"{function} must succeed, got {self._message(status)}. Free device memory or"
                " open the session with another backend."
            )

    def _message(self, status: int) -> str:
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        text: bytes | None = self._library.cudaGetErrorString(status)
        return f"error {status}: {(text or b'unknown').decode(errors='replace')}"


def _load_library() -> ctypes.CDLL:
    found = ctypes.util.find_library("cudart")
    for name in (*([found] if found else []), *_LIBRARIES):
        try:
            return ctypes.CDLL(name)
        except OSError:  # noqa: PERF203 (a handful of names, once)
            continue
    raise BackendUnavailableError(
        "libcudart is not on this machine's library path; install CUDA (JetPack brings it),"
        " or add its folder to LD_LIBRARY_PATH"
    )
