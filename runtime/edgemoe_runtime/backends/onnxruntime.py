"""Run a graph with onnxruntime, everything bound in place; only logits reach the host."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe_runtime.backends.base import CacheMark
from edgemoe_runtime.backends.kv_onnxruntime import make_kv_cache
from edgemoe_runtime.bundle.engine_cache import graph_fingerprint
from edgemoe_runtime.bundle.names import EXPERTS_USED
from edgemoe_runtime.errors import BackendError, BackendUnavailableError
from edgemoe_runtime.execution_providers import (
    CPU,
    MINIMUM_VERSION,
    PROVIDERS,
    TENSORRT,
    TENSORRT_RTX,
    release_numbers,
)

if TYPE_CHECKING:
    from types import TracebackType

    from numpy.typing import NDArray

    from edgemoe_runtime.backends.base import LogitArray, LogitRows, OpenRequest, TokenArray

# The release that an installation needs is said where onnxruntime is used, too.
__all__ = ["MINIMUM_VERSION", "OnnxRuntimeBackend", "open_onnxruntime"]


class OnnxRuntimeBackend:
    """One graph in an onnxruntime session."""

    def __init__(self, ort: Any, session: Any, request: OpenRequest, provider: str) -> None:
        model = request.manifest.model
        device = "cpu" if provider == CPU else "cuda"
        dtypes = {spec.name: spec.dtype for spec in request.manifest.outputs}
        half = dtypes["logits"] != "float32"
        self.name = f"onnxruntime:{provider}"
        self.chunk_tokens = request.chunk_tokens
        self.max_length = request.max_length
        self._length = 0
        self._bound_rows = 0
        self._ort: Any = ort
        self._session: Any = session
        self._k_cap: Any = None
        self._has_k_cap = bool(model.moe_layers)
        self._logits: NDArray[Any] = np.empty(
            (1, self.chunk_tokens, model.vocab_size), dtype=np.float16 if half else np.float32
        )
        self._mask = np.ones((1, request.max_length), dtype=np.int64)
        self._used: NDArray[np.int64] | None = None
        if EXPERTS_USED in dtypes:
            self._used = np.zeros(len(model.moe_layers), dtype=np.int64)
        self._cache: Any = make_kv_cache(
            ort,
            request.manifest.kv_cache,
            request.max_length,
            device,
            first_output=1 if self._used is None else 2,
        )
        self._binding: Any = self._new_binding()

    @property
    def length(self) -> int:
        """Tokens in the key-value cache."""
        return self._length

    def run(self, token_ids: TokenArray, k_cap: TokenArray, rows: LogitRows) -> LogitArray:
        """Append tokens to the cache and compute logits; see `Backend.run`."""
        count = len(token_ids)
        total = self._length + count
        positions = np.arange(self._length, total, dtype=np.int64)[None]
        bind = self._binding.bind_cpu_input
        bind("input_ids", np.ascontiguousarray(token_ids, dtype=np.int64)[None])
        bind("attention_mask", self._mask[:, :total])
        bind("position_ids", positions)
        if self._has_k_cap:
            # an input that has a default cannot be bound by its array; the binding borrows
            # the value, so it is kept
            self._k_cap = self._ort.OrtValue.ortvalue_from_numpy(k_cap)
            self._binding.bind_ortvalue_input("k_cap", self._k_cap)
        if count != self._bound_rows:
            self._bind_logits(self._binding, count)
        self._cache.before_run()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise BackendError(
                f"{self.name} failed on {count} tokens after {self._length}: {error}. Open the"
                " session with other providers, or free memory."
            ) from error
        self._cache.after_run()
        self._length = total
        first = {"none": count, "last": count - 1, "all": 0}[rows]
        return self._logits[0, first:count].astype(np.float32, copy=False)

    def experts_used(self) -> TokenArray | None:
        """Return how many experts the latest run used; see `Backend.experts_used`."""
        return self._used

    def mark(self) -> CacheMark:
        """Return the state of the cache."""
        state = self._cache.mark()
        if state is not None:
            self._binding = self._new_binding()
        return CacheMark(self._length, state)

    def rewind(self, mark: CacheMark) -> None:
        """Forget the tokens that were appended after the mark."""
        self._length = mark.length
        self._cache.rewind(mark.state)

    def reset(self) -> None:
        """Forget all tokens."""
        self.rewind(CacheMark(0, None))

    def close(self) -> None:
        """Free the session and its buffers."""
        self._binding = self._session = self._cache = self._k_cap = None

    def __enter__(self) -> OnnxRuntimeBackend:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _new_binding(self) -> Any:
        binding = self._session.io_binding()
        # these first, for the cache takes the outputs after them
        self._bind_logits(binding, 1)
        if self._used is not None:
            binding.bind_output(
                EXPERTS_USED, "cpu", 0, np.int64, self._used.shape, self._used.ctypes.data
            )
        self._cache.attach(binding)
        return binding

    def _bind_logits(self, binding: Any, count: int) -> None:
        self._bound_rows = count
        # a pointer into our own buffer: onnxruntime writes there and nothing is copied
        binding.bind_output(
            "logits",
            "cpu",
            0,
            self._logits.dtype.type,
            (1, count, self._logits.shape[-1]),
            self._logits.ctypes.data,
        )


def open_onnxruntime(request: OpenRequest) -> OnnxRuntimeBackend:
    """Open a graph with one execution provider.

    Raises:
        BackendUnavailableError: when onnxruntime, the provider or the graph cannot be used.
    """
    provider = request.provider or CPU
    try:
        ort: Any = importlib.import_module("onnxruntime")
        version = str(ort.__version__)
        available: list[str] = ort.get_available_providers()
    except (ImportError, OSError, AttributeError) as error:
        # an uninstalled twin package leaves a folder behind that imports as nothing
        raise BackendUnavailableError(
            f"onnxruntime cannot be imported ({error}); install it with"
            " `pip install 'edgemoe[ort]'` (GPU: 'edgemoe[ort-gpu]')"
        ) from error
    _check_version(version, request)
    if provider not in available:
        raise BackendUnavailableError(
            f"onnxruntime {version} here has no {provider} (it has {', '.join(available)});"
            " install the onnxruntime package of this device"
        )
    session = _open_session(ort, request, provider)
    opened: list[str] = session.get_providers()
    if provider not in opened:
        # onnxruntime itself only warns and goes on with the next provider
        raise BackendUnavailableError(
            f"onnxruntime {version} could not start {provider} (it fell back to"
            f" {', '.join(opened)}); check the driver and the CUDA and TensorRT libraries"
        )
    try:
        return OnnxRuntimeBackend(ort, session, request, provider)
    except Exception as error:
        raise BackendUnavailableError(
            f"{provider} could not allocate a cache of {request.max_length} tokens ({error})"
        ) from error


def _check_version(version: str, request: OpenRequest) -> None:
    needed = request.manifest.needs_onnxruntime
    if release_numbers(version) >= release_numbers(needed):
        return
    remedy = f"`pip install --upgrade 'onnxruntime>={needed}'` (with a GPU onnxruntime-gpu)"
    if sys.version_info < (3, 11):
        # which JetPack 6 brings
        remedy = "Python 3.10 gets 1.23 at most, so use Python 3.11 or later"
    raise BackendUnavailableError(
        f"onnxruntime must be {needed} or later for the graphs of this bundle, got {version};"
        f" {remedy}, or export for a target of TensorRT, whose graphs need less"
    )


def _open_session(ort: Any, request: OpenRequest, provider: str) -> Any:
    options = ort.SessionOptions()
    # errors only: at its default level it remarks that k_cap, an input, has a default
    options.log_severity_level = 3
    options.intra_op_num_threads = _thread_count(request.threads)
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    # spin between the operators of a run, where waking a thread would cost more than the
    # operator, but give the cores back as soon as a run ends
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.force_spinning_stop", "1")
    names = [provider, *PROVIDERS.get(provider, (CPU,))]
    available: list[str] = ort.get_available_providers()
    providers = [
        (name, _provider_options(request, name)) for name in names if name in available
    ]
    try:
        return ort.InferenceSession(str(request.graph), options, providers=providers)
    except Exception as error:
        raise BackendUnavailableError(
            f"{provider} could not load {request.graph.name} ({error})"
        ) from error


def _thread_count(threads: int | None) -> int:
    """Return the threads to use; 0 lets onnxruntime count the physical cores."""
    if threads is not None:
        return threads
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    # onnxruntime counts the machine's cores, not those that this process may use
    return allowed if 0 < allowed < (os.cpu_count() or 1) else 0


def _provider_options(request: OpenRequest, name: str) -> dict[str, str]:
    if name not in (TENSORRT, TENSORRT_RTX):
        return {}
    folder = _cache_folder(request)
    if folder is None:
        return {}
    if name == TENSORRT_RTX:
        return {"nv_runtime_cache_path": str(folder)}
    return {
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "1",
        "trt_timing_cache_path": str(folder),
    }


def _cache_folder(request: OpenRequest) -> Path | None:
    """Return this user's folder for engines of this very graph, or None without a home.

    onnxruntime loads engines by their file name alone, so they must neither come with a
    bundle nor outlive its weights.
    """
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        fingerprint = graph_fingerprint(request.manifest, request.task)
        folder = base / "edgemoe" / "onnxruntime" / fingerprint
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except (OSError, RuntimeError):
        return None
    return folder
