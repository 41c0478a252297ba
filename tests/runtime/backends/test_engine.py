"""Engines that fail in the middle of a request, with the real onnxruntime behind them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgemoe_runtime import BackendError, Session
from edgemoe_runtime.adaptive_k import rung_cost
from edgemoe_runtime.backends.base import OpenRequest
from edgemoe_runtime.backends.chain import CHAINS, Candidate
from edgemoe_runtime.backends.engine import Engine
from edgemoe_runtime.backends.onnxruntime import open_onnxruntime
from edgemoe_runtime.backends.registry import BACKENDS
from edgemoe_runtime.bundle.k_ladder import KRung, RungCost
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest
from edgemoe_runtime.execution_providers import CPU

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

IDS = np.random.default_rng(5).integers(0, 256, 40)
GOOD = Candidate("onnxruntime", CPU)


class Failing:
    """A real engine whose runs fail from one of them on."""

    def __init__(self, backend: Any, runs: int, most: int) -> None:
        self._backend, self._runs = backend, runs
        self.name = "failing"
        self.chunk_tokens = 16
        self.max_length = min(backend.max_length, most)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, *arguments: Any) -> Any:
        self._runs -= 1
        if self._runs < 0:
            raise BackendError("the driver is gone")
        return self._backend.run(*arguments)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Return a function that makes engines fail after so many runs, best first."""

    def put(*runs: int, most: int = 10**6, last: bool = True) -> None:
        names = [f"failing{number}" for number in range(len(runs))]
        for name, count in zip(names, runs, strict=True):

            def open_it(request: OpenRequest, count: int = count) -> Failing:
                return Failing(open_onnxruntime(request.with_provider(CPU)), count, most)

            monkeypatch.setitem(BACKENDS, name, open_it)
        chain = tuple(map(Candidate, names)) + ((GOOD,) if last else ())
        monkeypatch.setitem(CHAINS, "cpu", chain)

    return put


@pytest.mark.parametrize("runs", [(0,), (1,), (4,), (2, 0), (0, 3), (3, 1)])
def test_an_answer_goes_on_where_an_engine_fails(
    bundle: Path, install: Any, runs: tuple[int, ...]
) -> None:
    with Session.open(bundle) as session:
        expected = session.generate("A spindle that hums", max_new_tokens=12)
        choice = session.classify("It hums", ["bearing", "alignment", "none"])
    install(*runs)
    with Session.open(bundle) as session:
        answer = session.generate("A spindle that hums", max_new_tokens=12)
        explanation = session.explain()
        assert session.generate("A spindle that hums", max_new_tokens=12).tokens == (
            expected.tokens
        )
    assert answer.tokens == expected.tokens
    assert answer.backend == expected.backend == explanation.backend
    assert len(answer.fallbacks) == len(runs)
    for fallback in answer.fallbacks:
        assert (fallback.kind, fallback.backend) == ("engine", "failing")
        assert "failed while it ran: the driver is gone" in fallback.reason
    assert explanation.fallbacks == answer.fallbacks
    assert "the driver is gone" in str(explanation)
    assert answer.to_dict()["fallbacks"] == [f.to_dict() for f in answer.fallbacks]

    with Session.open(bundle) as session:
        again = session.classify("It hums", ["bearing", "alignment", "none"])
    np.testing.assert_allclose(again.values, choice.values, rtol=1e-5)
    assert again == choice


@pytest.mark.parametrize("runs", range(7))
def test_a_mark_outlives_its_engine(bundle: Path, install: Any, runs: int) -> None:
    install(runs)
    request = OpenRequest(
        bundle=bundle, manifest=load_manifest(bundle), task="model", max_length=64, threads=1
    )
    caps = [np.array(cap) for cap in ([3, 3], [1, 2])]
    with open_onnxruntime(request) as backend:
        backend.run(IDS[:9], caps[0], "none")
        backend.run(IDS[9:12], caps[1], "none")
        expected = np.array(backend.run(IDS[12:20], caps[0], "all"))
    with Engine(CHAINS["cpu"], request) as engine:
        # The prompt ran with two caps, and is run again with both.
        engine.run(IDS[:9], caps[0], "none")
        engine.run(IDS[9:12], caps[1], "none")
        mark = engine.mark()
        engine.run(IDS[30:37], caps[0], "none")
        for _ in range(2):
            engine.rewind(mark)
            assert engine.length == 12
            found = engine.run(IDS[12:20], caps[0], "all")
            np.testing.assert_allclose(found, expected, atol=1e-5)


def test_longer_chunks_than_the_next_engine_takes_are_cut(bundle: Path, install: Any) -> None:
    request = OpenRequest(
        bundle=bundle, manifest=load_manifest(bundle), task="model", max_length=64, threads=1
    )
    cap = np.array([3, 3])
    with open_onnxruntime(request) as backend:
        expected = np.array(backend.run(IDS, cap, "all"))
    install(99)
    (failing, _) = CHAINS["cpu"]
    for rows, wanted in (("all", expected), ("last", expected[-1:]), ("none", expected[:0])):
        with Engine([failing], request) as engine:
            np.testing.assert_allclose(engine.run(IDS, cap, rows), wanted, atol=1e-4)  # type: ignore[arg-type]
            assert engine.length == len(IDS)


def test_when_nothing_is_left_the_reason_is_given(bundle: Path, install: Any) -> None:
    install(1, last=False)
    with (
        Session.open(bundle) as session,
        pytest.raises(BackendError, match="the driver is gone"),
    ):
        session.generate("A spindle", max_new_tokens=4)


def test_when_the_rest_of_the_chain_cannot_be_opened_both_reasons_are_given(
    bundle: Path, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(1, 0, last=False)

    def refuse(request: OpenRequest) -> Any:
        raise BackendError(f"no such device for {request.task}")

    monkeypatch.setitem(BACKENDS, "failing1", refuse)
    with Session.open(bundle) as session:
        for _ in range(2):
            with pytest.raises(BackendError, match=r"(?s)driver is gone.*no such device"):
                session.generate("A spindle", max_new_tokens=4)
        assert "the driver is gone" in str(session.explain())


def test_rungs_are_timed_again_on_the_engine_that_took_over(
    build_bundle: Any, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, timed = build_bundle(), []
    manifest = load_manifest(folder)
    rungs = tuple(
        KRung(name=f"k{k}", k_cap=(k,) * 2, cost=RungCost(cost, cost))
        for k, cost in ((3, 1.0), (1, 0.5))
    )
    entry = replace(manifest.tasks["model"], k_ladder=rungs)
    save_manifest(replace(manifest, tasks={"model": entry}), folder)

    def measure(backend: Any, caps: Any, *_: Any) -> list[RungCost]:
        timed.append(backend.name)
        return [RungCost(1.0, 1.0), RungCost(0.99, 0.99)]

    monkeypatch.setattr(rung_cost, "measure_costs", measure)
    install(40)
    with Session.open(folder, token_ms=1e6) as session:
        assert session.explain().ladder == ("k3", "k1")
        while session.explain().backend == "failing":
            session.generate("A spindle", max_new_tokens=4)
        assert timed == []
        session.classify("A spindle", ["bearing", "none"])
        assert timed == ["onnxruntime:CPUExecutionProvider"]
        # There a rung saves nothing.
        assert session.explain().ladder == ("k3",)
        session.generate("A spindle", max_new_tokens=4)
        assert len(timed) == 1


def test_an_engine_that_cannot_hold_the_request_is_passed_over(
    bundle: Path, install: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(3, 99, most=10)
    big = BACKENDS["failing0"]

    def open_big(request: OpenRequest) -> Any:
        backend: Any = big(request)
        backend.max_length = 64
        return backend

    monkeypatch.setitem(BACKENDS, "failing0", open_big)
    with Session.open(bundle) as session:
        answer = session.generate("A spindle that hums", max_new_tokens=5)
    assert answer.backend == "onnxruntime:CPUExecutionProvider"
    assert [f.reason.split(":")[0] for f in answer.fallbacks] == ["failed while it ran"] * 2
    assert "must hold the" in answer.fallbacks[1].reason


def test_requests_for_other_lengths_are_untouched(bundle: Path) -> None:
    request = OpenRequest(
        bundle=bundle, manifest=load_manifest(bundle), task="model", max_length=64, threads=1
    )
    with Engine([GOOD], replace(request, max_length=32)) as engine:
        assert engine.max_length == 32
        assert engine.fallbacks == ()
