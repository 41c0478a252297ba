"""The fall-back chain: every step down has its reason."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from edgemoe_runtime import BackendError, Session
from edgemoe_runtime.backends.chain import CHAINS, plan_chain
from edgemoe_runtime.backends.registry import BACKENDS
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest
from edgemoe_runtime.bundle.names import TARGETS
from edgemoe_runtime.errors import BackendUnavailableError

Build = Callable[..., Path]


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BackendUnavailableError("no CUDA device answers; check the driver")

    monkeypatch.setattr("edgemoe_runtime.backends.tensorrt.CudaRuntime", refuse)


def test_every_target_ends_on_the_cpu() -> None:
    assert set(CHAINS) == set(TARGETS)
    for chain in CHAINS.values():
        assert chain[-1].name == "onnxruntime:CPUExecutionProvider"
        assert {candidate.backend for candidate in chain} <= set(BACKENDS)
    names = [candidate.name for candidate in plan_chain("tensorrt-rtx")]
    assert names == [
        "tensorrt_rtx",
        "onnxruntime:NvTensorRTRTXExecutionProvider",
        "onnxruntime:CUDAExecutionProvider",
        "onnxruntime:CPUExecutionProvider",
    ]


@pytest.mark.usefixtures("no_gpu")
def test_each_step_down_is_explained(build_bundle: Build) -> None:
    folder = build_bundle(target="tensorrt-rtx", flavour="tensorrt")
    with Session.open(folder) as session:
        answer = session.generate("abc", max_new_tokens=2)
        text = str(session.explain())
    assert answer.backend == "onnxruntime:CPUExecutionProvider"
    assert [fallback.backend for fallback in answer.fallbacks] == [
        "tensorrt_rtx",
        "onnxruntime:NvTensorRTRTXExecutionProvider",
        "onnxruntime:CUDAExecutionProvider",
    ]
    assert all(str(fallback) in text for fallback in answer.fallbacks)
    assert "it has" in answer.fallbacks[2].reason


def test_a_graph_of_the_other_flavour_is_never_given_to_tensorrt(build_bundle: Build) -> None:
    folder = build_bundle(target="tensorrt", flavour="ort")
    with Session.open(folder) as session:
        assert "flavour ort" in session.explain().fallbacks[0].reason


def test_a_chosen_engine_is_not_replaced(bundles: dict[str, Path]) -> None:
    with pytest.raises(BackendError, match=r"tried 1:\n  onnxruntime:CUDAExecutionProvider"):
        Session.open(bundles["concat"], providers=["cuda"])
    with pytest.raises(BackendError, match="tensorrt"):
        Session.open(bundles["concat"], backend="tensorrt")
    with Session.open(bundles["concat"], providers=["cuda", "cpu"]) as session:
        (fallback,) = session.explain().fallbacks
        assert fallback.backend == "onnxruntime:CUDAExecutionProvider"


def test_a_graph_that_does_not_load_is_an_error_not_a_crash(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr("onnxruntime.InferenceSession", fail)
    with pytest.raises(BackendError, match="out of memory"):
        Session.open(bundles["concat"])


def test_an_onnxruntime_older_than_the_bundle_needs_is_refused_by_name(
    tmp_path: Path, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("onnxruntime.__version__", "1.30.0")
    with Session.open(bundles["concat"]) as session:
        assert session.generate("abc", max_new_tokens=1).new_tokens == 1
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles["concat"], bundle)
    save_manifest(replace(load_manifest(bundle), needs_onnxruntime="1.31"), bundle)
    rule = r"onnxruntime must be 1\.31 or later for the graphs of this bundle, got 1\.30\.0"
    with pytest.raises(BackendError, match=rule):
        Session.open(bundle)
    monkeypatch.setattr("onnxruntime.__version__", "1.31.0.dev20261101")
    with Session.open(bundle) as session:
        assert session.generate("abc", max_new_tokens=1).new_tokens == 1
