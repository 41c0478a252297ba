"""Costs of a ladder's rungs, and which rungs they make worth having."""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe_runtime.adaptive_k.rung_cost import (
    measure_costs,
    measure_prompt_offset,
    without_dominated,
)
from edgemoe_runtime.backends.base import OpenRequest
from edgemoe_runtime.backends.onnxruntime import open_onnxruntime
from edgemoe_runtime.bundle.k_ladder import KRung, RungCost, RungQuality
from edgemoe_runtime.bundle.manifest_file import load_manifest

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


def rung(drop: float, cost: float, name: str = "x", prefill: float | None = None) -> KRung:
    return KRung(
        name=name,
        k_cap=(1,),
        quality=RungQuality(
            metric="perplexity",
            value=1.0 + drop,
            ci95=(0.0, 9.0),
            drop=drop,
            drop_ci95=(drop, drop),
            lines=5,
        ),
        cost=RungCost(prefill=cost if prefill is None else prefill, decode=cost),
    )


@given(st.lists(st.tuples(st.floats(-0.1, 0.5), st.floats(0.05, 1.5)), min_size=0, max_size=9))
def test_what_is_left_out_is_beaten_and_what_stays_is_not(
    measured: list[tuple[float, float]],
) -> None:
    rungs = [
        rung(0, 1, "full"),
        *(rung(d, c, str(i)) for i, (d, c) in enumerate(measured)),
    ]
    kept = without_dominated(rungs)
    assert kept[0] is rungs[0]
    costs = [each.cost.decode for each in kept if each.cost]
    assert all(after <= 0.98 * before for before, after in itertools.pairwise(costs))
    drops = [each.quality.drop for each in kept[1:] if each.quality]
    assert drops == sorted(drops)
    for left in rungs:
        # No slower by more than what counts as the same, and no worse.
        assert any(
            each.cost.decode * 0.98 <= left.cost.decode  # type: ignore[union-attr]
            and (each is rungs[0] or each.quality.drop <= left.quality.drop)  # type: ignore[union-attr]
            for each in kept
        )


def test_a_rung_may_save_on_prompts_alone() -> None:
    full = rung(0, 1, "full")
    assert len(without_dominated([full, rung(0.1, 0.99, prefill=0.9)])) == 2
    assert len(without_dominated([full, rung(0.1, 0.99, prefill=0.99)])) == 1
    assert len(without_dominated([full, rung(0.1, 0.9, prefill=1.1)])) == 1


def test_what_is_asked_again_costs_time() -> None:
    full, low = rung(0, 1, "full"), rung(0.1, 0.7, "low")
    assert low.quality is not None
    for again, length in ((0.25, 2), (0.35, 1)):
        quality = replace(low.quality, metric="accuracy", asked_again=again)
        assert len(without_dominated([full, replace(low, quality=quality)])) == length
        # Texts may be streamed, which are never escalated.
        quality = replace(quality, metric="perplexity")
        assert len(without_dominated([full, replace(low, quality=quality)])) == 2


def test_costs_are_of_the_engine_at_hand(bundle: Path) -> None:
    manifest = load_manifest(bundle)
    request = OpenRequest(
        bundle=bundle, manifest=manifest, task="model", max_length=48, threads=1
    )
    with open_onnxruntime(request) as backend:
        costs = measure_costs(backend, [(3, 3), (1, 1)], manifest.model.vocab_size, rounds=2)
    assert costs[0] == RungCost(1.0, 1.0)
    assert 0 < costs[1].decode < 10


def test_of_rungs_without_a_quality_the_later_loses_more() -> None:
    rungs = [KRung(name=str(c), k_cap=(1,), cost=RungCost(c, c)) for c in (1.0, 0.8, 0.9, 0.7)]
    assert [each.name for each in without_dominated(rungs)] == ["1.0", "0.8", "0.7"]


class Clocked:
    """An engine whose runs take a fixed time and one for each token, by a clock of its own."""

    chunk_tokens = 512
    max_length = 512

    def __init__(self, fixed: float, each: float) -> None:
        self.fixed, self.each, self.now, self.resets = fixed, each, 0.0, 0

    def reset(self) -> None:
        self.resets += 1

    def run(self, tokens: NDArray[np.int64], *_: object) -> None:
        self.now += self.fixed + self.each * len(tokens)


@pytest.mark.parametrize(
    ("fixed", "each", "offset"), [(8.0, 0.1, 80.0), (0.0, 1.0, 0.0), (5.0, 0.0, 4096.0)]
)
def test_an_offset_is_what_prompts_of_all_lengths_take(
    monkeypatch: pytest.MonkeyPatch, fixed: float, each: float, offset: float
) -> None:
    engine: Any = Clocked(fixed, each)
    monkeypatch.setattr(time, "perf_counter", lambda: engine.now)
    found = measure_prompt_offset(engine, rung(0, 1, "full"), 100)
    assert found == pytest.approx(offset, abs=1e-6)
    assert engine.resets
