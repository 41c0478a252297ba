"""Run a TensorRT engine of the bundle's cache; tensorrt and tensorrt_rtx have one API.

Never run on a device by the project's own tests: there is no GPU where they run. What they
do run is every refusal, and the loop over a simulated engine.
"""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe_runtime.backends.base import CacheMark
from edgemoe_runtime.backends.cuda_memory import CudaRuntime
from edgemoe_runtime.bundle.engine_cache import find_engine
from edgemoe_runtime.bundle.names import EXPERTS_USED
from edgemoe_runtime.errors import BackendError, BackendUnavailableError

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from edgemoe_runtime.backends.base import LogitArray, LogitRows, OpenRequest, TokenArray
    from edgemoe_runtime.bundle.engine_cache import EngineKey

_TYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def open_tensorrt(request: OpenRequest) -> TensorRtBackend:
    """Open the engine that the full TensorRT (JetPack's) built.

    Raises:
        BackendUnavailableError: when there is no package, GPU or fitting engine.
    """
    return _open("tensorrt", request)


def open_tensorrt_rtx(request: OpenRequest) -> TensorRtBackend:
    """Open the engine that TensorRT for RTX built.

    Raises:
        BackendUnavailableError: when there is no package, GPU or fitting engine.
    """
    return _open("tensorrt_rtx", request)


def _open(package: str, request: OpenRequest) -> TensorRtBackend:
    if request.manifest.flavour != "tensorrt":
        raise BackendUnavailableError(
            f"the graph is lowered for onnxruntime (flavour {request.manifest.flavour}), which"
            " TensorRT does not build; export with --target tensorrt-rtx or a jetson target"
        )
    try:
        trt: Any = importlib.import_module(package)
    except (ImportError, OSError) as error:
        raise BackendUnavailableError(
            f"{package} cannot be imported ({error}); JetPack brings tensorrt, pip"
            " install 'edgemoe[tensorrt-rtx]' brings tensorrt_rtx"
        ) from error
    try:
        return _open_engine(package, trt, request)
    except BackendError:
        raise
    except Exception as error:  # bindings raise classes of their own
        raise BackendUnavailableError(
            f"{package} could not open the engine ({error})"
        ) from error


def _open_engine(package: str, trt: Any, request: OpenRequest) -> TensorRtBackend:
    cuda = CudaRuntime()
    search = find_engine(
        request.bundle,
        request.manifest,
        request.task,
        package=package,
        package_version=str(trt.__version__),
        compute_capabilities=[cuda.compute_capability()],
    )
    if search.path is None or search.key is None:
        raise BackendUnavailableError(search.reason)
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    # no plugin library and no host code: an engine brings neither here
    runtime.engine_host_code_allowed = False
    engine = runtime.deserialize_cuda_engine(search.path.read_bytes())
    if engine is None:
        raise BackendUnavailableError(
            f"{package} refused {search.path.name}; build it again with `edgemoe compile`"
        )
    moe = bool(request.manifest.model.moe_layers)
    # Where shapes inside the graph follow the caps, TensorRT reads them on the host.
    caps_on_host = moe and engine.get_tensor_location("k_cap") == trt.TensorLocation.HOST
    return TensorRtBackend(
        package, runtime, engine, cuda, request, search.key, caps_on_host=caps_on_host
    )


def _engine_length(request: OpenRequest, key: EngineKey) -> int:
    """Return how many tokens a session may have: those asked for, or the engine's most."""
    if "attention_mask" not in key.shapes:
        return request.max_length
    longest = key.shapes["attention_mask"][2][1]
    if longest < request.max_length and request.needs_length:
        raise BackendUnavailableError(
            f"the engine takes {longest} tokens at most, and max_length is"
            f" {request.max_length}; build one with `edgemoe compile --max-length"
            f" {request.max_length}`"
        )
    return min(longest, request.max_length)


class TensorRtBackend:
    """One engine with sets of cache buffers that swap roles after every run.

    The graph has the form `concat`: present is past with the new positions appended, so past
    and present cannot share memory; a marked state keeps a third set. Nothing but token ids,
    positions, masks, caps and the wanted logits crosses to or from the host.
    """

    def __init__(
        self,
        package: str,
        runtime: Any,
        engine: Any,
        cuda: CudaRuntime,
        request: OpenRequest,
        key: EngineKey,
        *,
        caps_on_host: bool = False,
    ) -> None:
        model, cache = request.manifest.model, request.manifest.kv_cache
        self.name = f"{package}:sm{key.compute_capability}"
        longest = key.shapes["input_ids"][2][1] if "input_ids" in key.shapes else 1
        self.chunk_tokens = min(request.chunk_tokens, longest)
        self.max_length = _engine_length(request, key)
        self._runtime, self._engine, self._cuda = runtime, engine, cuda
        self._cache, self._vocabulary = cache, model.vocab_size
        self._has_k_cap, self._caps_on_host = bool(model.moe_layers), caps_on_host
        self._length = 0
        self._addresses: list[int] = []
        dtypes = {spec.name: spec.dtype for spec in request.manifest.outputs}
        if cache.form != "concat" or dtypes["logits"] == "bfloat16":
            raise BackendUnavailableError(
                "a TensorRT graph must have a concat cache and float32 or float16 logits, got"
                f" {cache.form} and {dtypes['logits']}; export the bundle again"
            )
        self._used: NDArray[np.int64] | None = None
        if EXPERTS_USED in dtypes:
            self._used = np.zeros(len(model.moe_layers), dtype=np.int64)
        self._logit_type = np.dtype(np.float16 if dtypes["logits"] == "float16" else np.float32)
        self._context: Any = engine.create_execution_context()
        if self._context is None:
            raise BackendUnavailableError(
                f"{package} could not make an execution context: too little device memory"
            )
        self._mask = np.ones((1, self.max_length), dtype=np.int64)
        self._closed = False
        self._stream = cuda.create_stream()
        try:
            self._allocate_all(len(model.moe_layers))
        except BaseException:
            self.close()
            raise

    def _allocate_all(self, moe_layers: int) -> None:
        self._inputs = {
            name: self._allocate(8 * size)
            for name, size in (
                ("input_ids", self.chunk_tokens),
                ("position_ids", self.chunk_tokens),
                ("attention_mask", self.max_length),
                ("k_cap", max(1, moe_layers)),
            )
        }
        self._logits = self._allocate(
            self._logit_type.itemsize * self.chunk_tokens * self._vocabulary
        )
        self._used_address = 0 if self._used is None else self._allocate(self._used.nbytes)
        self._sets = [self._allocate_cache(), self._allocate_cache()]
        self._past: dict[str, int] = self._sets[0]
        self._pinned: dict[str, int] | None = None

    @property
    def length(self) -> int:
        """Tokens in the key-value cache."""
        return self._length

    def run(self, token_ids: TokenArray, k_cap: TokenArray, rows: LogitRows) -> LogitArray:
        """Append tokens to the cache and compute logits; see `Backend.run`."""
        count = len(token_ids)
        total = self._length + count
        host = {
            "input_ids": np.ascontiguousarray(token_ids, dtype=np.int64)[None],
            "position_ids": np.arange(self._length, total, dtype=np.int64)[None],
            "attention_mask": self._mask[:, :total],
        }
        if self._has_k_cap:
            host["k_cap"] = np.ascontiguousarray(k_cap, dtype=np.int64)
        for name, array in host.items():
            address = self._inputs[name]
            if name == "k_cap" and self._caps_on_host:
                address = array.ctypes.data
            else:
                self._cuda.upload(address, array, self._stream)
            self._bind(name, address, array.shape)
        present = self._spare_set()
        self._bind("logits", self._logits, None)
        if self._used is not None:
            self._bind(EXPERTS_USED, self._used_address, None)
        for tensor in self._cache.tensors(self._length):
            self._bind(tensor.past, self._past[tensor.name], tensor.shape)
            self._bind(tensor.present, present[tensor.name], None)
        if not self._context.execute_async_v3(self._stream):
            raise BackendError(
                f"{self.name} failed on {count} tokens after {self._length}. Build the engine"
                " again with `edgemoe compile`, or open the session with another backend."
            )
        first = {"none": count, "last": count - 1, "all": 0}[rows]
        logits = np.empty((count - first, self._vocabulary), dtype=self._logit_type)
        if logits.size:
            offset = first * self._vocabulary * self._logit_type.itemsize
            self._cuda.download(logits, self._logits + offset, self._stream)
        if self._used is not None:
            self._cuda.download(self._used, self._used_address, self._stream)
        self._cuda.synchronise(self._stream)
        self._past = present
        self._length = total
        return logits.astype(np.float32, copy=False)

    def experts_used(self) -> TokenArray | None:
        """Return how many experts the latest run used; see `Backend.experts_used`."""
        return self._used

    def mark(self) -> CacheMark:
        """Return the state of the cache."""
        self._pinned = self._past
        return CacheMark(self._length, self._past)

    def rewind(self, mark: CacheMark) -> None:
        """Forget the tokens that were appended after the mark."""
        if self._pinned is None or mark.state is not self._pinned:
            raise ValueError("mark must be the latest one that mark() returned")
        self._length, self._past = mark.length, self._pinned

    def reset(self) -> None:
        """Forget all tokens."""
        self._length = 0
        self._pinned = None
        # Keys and values of no length are none, but a state is read from the first token on.
        for tensor in self._cache.others(0):
            size_bytes = _TYPE_BYTES[tensor.dtype] * math.prod(tensor.shape)
            self._cuda.clear(self._past[tensor.name], size_bytes, self._stream)

    def close(self) -> None:
        """Free the engine and device memory, also where the device has failed."""
        if self._closed:
            return
        self._closed = True
        try:
            self._cuda.synchronise(self._stream)
        finally:
            self._context = self._engine = self._runtime = None
            while self._addresses:
                self._cuda.free(self._addresses.pop())
            self._cuda.destroy_stream(self._stream)

    def __enter__(self) -> TensorRtBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _bind(self, name: str, address: int, shape: tuple[int, ...] | None) -> None:
        bound = bool(self._context.set_tensor_address(name, address))
        if shape is not None:
            bound = bound and bool(self._context.set_input_shape(name, shape))
        if not bound:
            raise BackendError(
                f"{self.name} must accept {name} with shape {shape}; the engine was built for"
                " other shapes. Build it again with `edgemoe compile`."
            )

    def _spare_set(self) -> dict[str, int]:
        """Return buffers that hold neither the past nor a marked state."""
        for buffers in self._sets:
            if buffers is not self._past and buffers is not self._pinned:
                return buffers
        self._sets.append(self._allocate_cache())
        return self._sets[-1]

    def _allocate_cache(self) -> dict[str, int]:
        return {
            tensor.name: self._allocate(_TYPE_BYTES[tensor.dtype] * math.prod(tensor.shape))
            for tensor in self._cache.tensors(self.max_length)
        }

    def _allocate(self, size_bytes: int) -> int:
        address = self._cuda.allocate(size_bytes)
        self._addresses.append(address)
        return address
