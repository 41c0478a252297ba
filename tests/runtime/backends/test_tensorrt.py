"""The TensorRT loop with a simulated engine: a graph, with host memory for device memory.

No GPU runs this project's tests, so what is checked here is the bookkeeping: shapes,
addresses, the roles of the cache buffers, marks, and every refusal.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime
import pytest

from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe_exporters.export import export_bundle
from edgemoe_exporters.request import ExportRequest
from edgemoe_runtime import BackendError, RequestError, Session
from edgemoe_runtime.bundle.engine_cache import EngineKey, graph_fingerprint, hash_file
from edgemoe_runtime.bundle.manifest_file import load_manifest

Build = Callable[..., Path]
TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class HostCuda:
    """Device memory that lies on the host."""

    alive: dict[int, Any]

    def __init__(self) -> None:
        self.alive = {}
        type(self).last = self  # type: ignore[attr-defined]

    def compute_capability(self) -> int:
        return 89

    def create_stream(self) -> int:
        return 1

    def destroy_stream(self, stream: int) -> None:
        assert stream == 1

    def synchronise(self, stream: int) -> None:
        assert stream == 1

    def allocate(self, size_bytes: int) -> int:
        memory = ctypes.create_string_buffer(size_bytes)
        address = ctypes.addressof(memory)
        self.alive[address] = memory
        return address

    def clear(self, address: int, size_bytes: int, stream: int) -> None:
        ctypes.memset(address, 0, size_bytes)

    def free(self, address: int) -> None:
        del self.alive[address]

    def upload(self, address: int, array: np.ndarray[Any, Any], stream: int) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray[Any, Any], address: int, stream: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)


class GraphContext:
    """Runs the bundle's own graph between the addresses it is given."""

    def __init__(self, session: Any) -> None:
        self.session = session
        self.addresses: dict[str, int] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return address != 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return name != "input_ids" or shape[1] <= 8

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {}
        for value in self.session.get_inputs():
            array = np.zeros(self.shapes[value.name], dtype=TYPES[value.type])
            ctypes.memmove(array.ctypes.data, self.addresses[value.name], array.nbytes)
            feeds[value.name] = array
        names = [value.name for value in self.session.get_outputs()]
        for name, output in zip(names, self.session.run(names, feeds), strict=True):
            whole = np.ascontiguousarray(output)
            ctypes.memmove(self.addresses[name], whole.ctypes.data, whole.nbytes)
        return True


@pytest.fixture
def simulated_engine(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: Any = ModuleType("tensorrt_rtx")
    module.__version__ = "9.9.9"

    class Logger:
        ERROR = 1

        def __init__(self, level: int) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Logger) -> None:
            self.engine_host_code_allowed = True

        def deserialize_cuda_engine(self, data: bytes) -> Any:
            assert not self.engine_host_code_allowed
            if data == b"broken":
                return None
            session = onnxruntime.InferenceSession(data.decode())
            return SimpleNamespace(
                create_execution_context=lambda: GraphContext(session),
                get_tensor_location=lambda name: module.location[name],
            )

    module.Logger, module.Runtime = Logger, Runtime
    module.TensorLocation = SimpleNamespace(HOST="host", DEVICE="device")
    module.location = {"k_cap": "device"}
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setattr("edgemoe_runtime.backends.tensorrt.CudaRuntime", HostCuda)
    checked: ModuleType = module
    return checked


def add_engine(folder: Path, content: bytes | None = None, **changes: Any) -> None:
    manifest = load_manifest(folder)
    engines = folder / "engines"
    engines.mkdir(exist_ok=True)
    content = content or str(folder / "model.onnx").encode()
    (engines / "new").write_bytes(content)
    fields: dict[str, Any] = {
        "task": "model",
        "graph_sha256": graph_fingerprint(manifest, "model"),
        "precision": "fp32",
        "package": "tensorrt_rtx",
        "package_version": "9.9.9",
        "compute_capability": 89,
        "shapes": {"input_ids": ((1, 1), (1, 4), (1, 8))},
        "engine_sha256": hash_file(engines / "new"),
        "engine_size": len(content),
    }
    key = EngineKey(**(fields | changes))
    (engines / "new").rename(engines / key.file_name)
    (engines / f"{key.file_name}.json").write_text(key.dumps())


@pytest.fixture
def folder(build_bundle: Build) -> Path:
    return build_bundle(target="tensorrt-rtx", flavour="tensorrt")


@pytest.mark.parametrize("location", ["device", "host"])
def test_answers_equal_those_of_onnxruntime(
    folder: Path, simulated_engine: Any, location: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_engine(folder)
    simulated_engine.location["k_cap"] = location
    bind = GraphContext.set_tensor_address

    def check(self: GraphContext, name: str, address: int) -> bool:
        on_device = address in HostCuda.last.alive  # type: ignore[attr-defined]
        assert on_device == (name != "k_cap" or location == "device"), name
        return bind(self, name, address)

    monkeypatch.setattr(GraphContext, "set_tensor_address", check)
    with Session.open(folder) as session, Session.open(folder, providers=["cpu"]) as other:
        assert session.explain().backend == "tensorrt_rtx:sm89"
        assert session.explain().fallbacks == ()
        prompt = "longer than the eight tokens of the profile"
        for k_cap in (None, 1):
            session.set_k_cap(k_cap)
            other.set_k_cap(k_cap)
            answer = session.generate(prompt, max_new_tokens=12)
            assert answer.tokens == other.generate(prompt, max_new_tokens=12).tokens
            choices = ["alpha", "beta which is long", "c"]
            found, expected = (s.classify(prompt, choices) for s in (session, other))
            assert found.values == pytest.approx(expected.values, abs=1e-4)
            ids = session.encode(prompt)
            np.testing.assert_allclose(
                session.token_logprobs(ids, 2), other.token_logprobs(ids, 2), atol=1e-4
            )
    assert HostCuda.last.alive == {}  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.states
@pytest.mark.usefixtures("simulated_engine")
def test_states_begin_anew_with_each_text(tmp_path: Path) -> None:
    write_tiny_checkpoint("qwen3_next", tmp_path / "model")
    folder = tmp_path / "bundle"
    export_bundle(
        ExportRequest(
            model=tmp_path / "model", output=folder, target="tensorrt-rtx", precision="fp32"
        )
    )
    add_engine(folder)
    assert load_manifest(folder).kv_cache.states
    with Session.open(folder) as session, Session.open(folder, providers=["cpu"]) as other:
        assert session.explain().backend == "tensorrt_rtx:sm89"
        for prompt in ("w5 w9 w7 w11 w4 w8 w30 w31 w40 w41", "w8 w3"):
            answer, expected = (s.generate(prompt, max_new_tokens=6) for s in (session, other))
            assert answer.tokens == expected.tokens
            choices = ["w12 w13", "w14"]
            found, expected_choice = (s.classify(prompt, choices) for s in (session, other))
            assert found.values == pytest.approx(expected_choice.values, abs=1e-4)


@pytest.mark.usefixtures("simulated_engine")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"graph_sha256": "0" * 64}, "graph_sha256"),
        ({"package_version": "9.9.8"}, "package_version"),
        ({"package": "tensorrt"}, "package"),
        ({"compute_capability": 86}, "compute_capability"),
        ({"precision": "int4"}, "precision"),
        ({"engine_sha256": "0" * 64}, "digest"),
        ({"engine_size": 1}, "digest"),
    ],
)
def test_only_a_fitting_engine_is_loaded(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    add_engine(folder, **changes)
    with pytest.raises(BackendError, match=reason):
        Session.open(folder, backend="tensorrt_rtx")


@pytest.mark.usefixtures("simulated_engine")
def test_an_engine_limits_what_a_session_takes(folder: Path) -> None:
    shapes = {
        "input_ids": ((1, 1), (1, 4), (1, 8)),
        "attention_mask": ((1, 1), (1, 16), (1, 24)),
    }
    add_engine(folder, shapes=shapes)
    with Session.open(folder) as session:
        assert session.explain().max_length == 24
        answer = session.generate("0123456789", max_new_tokens=99)
        assert (answer.finish_reason, answer.new_tokens) == ("max_length", 24 - 10 + 1)
        with pytest.raises(RequestError, match="max_length 24"):
            session.generate("x" * 25)
    with Session.open(folder, max_length=20) as session:
        assert session.explain().backend == "tensorrt_rtx:sm89"
    with Session.open(folder, max_length=25) as session:
        explained = session.explain()
    assert explained.backend == "onnxruntime:CPUExecutionProvider"
    assert "24 tokens at most" in explained.fallbacks[0].reason


@pytest.mark.usefixtures("simulated_engine")
@pytest.mark.parametrize("failing", range(0, 13, 3))
def test_too_little_device_memory_is_a_step_down_and_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    add_engine(folder)
    allocate = HostCuda.allocate

    def refuse(self: HostCuda, size_bytes: int) -> int:
        if len(self.alive) == failing:
            raise BackendError("cudaMalloc must succeed, got error 2: out of memory.")
        return allocate(self, size_bytes)

    monkeypatch.setattr(HostCuda, "allocate", refuse)
    with Session.open(folder) as session:
        explained = session.explain()
    assert explained.backend == "onnxruntime:CPUExecutionProvider"
    assert "out of memory" in explained.fallbacks[0].reason
    assert HostCuda.last.alive == {}  # type: ignore[attr-defined]


def test_what_the_bindings_raise_is_a_step_down(folder: Path, simulated_engine: Any) -> None:
    add_engine(folder)

    def explode(*_: object) -> None:
        raise RuntimeError("the driver is too old")

    simulated_engine.Runtime = explode
    with Session.open(folder) as session:
        assert "the driver is too old" in session.explain().fallbacks[0].reason


@pytest.mark.usefixtures("simulated_engine")
def test_refusals_name_what_to_do(folder: Path) -> None:
    with pytest.raises(BackendError, match=r"the folder holds none.*edgemoe compile"):
        Session.open(folder, backend="tensorrt_rtx")
    (folder / "engines").mkdir()
    (folder / "engines" / "bad.json").write_text("{}")
    with pytest.raises(BackendError, match="must have the keys"):
        Session.open(folder, backend="tensorrt_rtx")
    add_engine(folder, b"broken")
    with pytest.raises(BackendError, match="refused model__fp32"):
        Session.open(folder, backend="tensorrt_rtx")


def test_without_a_package_or_a_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(BackendError, match="tensorrt_rtx cannot be imported"):
        Session.open(folder, backend="tensorrt_rtx")
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", ModuleType("tensorrt_rtx"))
    monkeypatch.setattr("edgemoe_runtime.backends.cuda_memory._LIBRARIES", ())
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with pytest.raises(BackendError, match="libcudart"):
        Session.open(folder, backend="tensorrt_rtx")
