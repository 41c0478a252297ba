"""OWL: how outliers become numbers of experts, and plans that follow them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import brentq

from edgemoe.calibrate.collect import collect
from edgemoe.errors import PlanError
from edgemoe.layerwise.provider import open_layers
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.shapes import LayerShape
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.oracle.outliers import outlier_ratios
from edgemoe.prune.owl import Owl, share_by_outliers
from edgemoe.prune.registry import METHODS, make_plan, read_options
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from edgemoe.calibrate.statistics import Statistics


def layers_of(
    count: int, experts: int = 16, top_k: int = 2, n_group: int = 1
) -> list[LayerShape]:
    return [
        LayerShape(layer=i, num_experts=experts, top_k=top_k, n_group=n_group)
        for i in range(count)
    ]


def test_shares_by_hand() -> None:
    # 0.2 is a step of 20 experts in 100: the range is 40 wide and its mean is moved to 50.
    layers = layers_of(3, experts=100)
    ratios = np.array([0.0, 0.05, 0.1])
    assert share_by_outliers(layers, [50] * 3, ratios, 0.2) == (30, 50, 70)
    # One layer stands out: the authors' mean would put it at 50 + 40 * 2 / 3, above 70.
    ratios = np.array([0.0, 0.0, 0.1])
    assert share_by_outliers(layers, [50] * 3, ratios, 0.2) == (40, 40, 70)
    # A router that needs 45 experts: what it keeps the others miss.
    assert share_by_outliers(layers_of(3, 100, 45), [50] * 3, ratios, 0.2) == (45, 45, 60)
    assert share_by_outliers(layers, [90] * 3, ratios, 0.2) == (85, 85, 100)
    assert share_by_outliers(layers, [50] * 3, np.full(3, 0.1), 0.2) == (50, 50, 50)
    # The published range moves layers of 16 experts by one or two.
    ratios = np.linspace(0, 0.05, 5)
    assert share_by_outliers(layers_of(5), [8] * 5, ratios, 0.08) == (7, 7, 8, 9, 9)


@example([0.0, 1.0, 0.0], (16, 6, 1), 0.5, 0.08)
@example([1e-300, 0.0], (16, 2, 1), 0.3, 1.0)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=8),
    st.sampled_from([(16, 2, 1), (16, 6, 1), (16, 4, 4), (9, 3, 3), (128, 8, 1)]),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_the_total_stays_within_bounds_and_more_outliers_keep_more(
    ratios: list[float], sizes: tuple[int, int, int], share: float, spread: float
) -> None:
    experts, _, groups = sizes
    layers = layers_of(len(ratios), *sizes)
    least = layers[0].least_kept
    count = round((least + share * (experts - least)) / groups) * groups
    found = share_by_outliers(layers, [count] * len(ratios), np.array(ratios), spread)
    assert sum(found) == count * len(ratios)
    for kept in found:
        assert least <= kept <= experts
        assert kept % groups == 0
        assert abs(kept - count) < spread * experts + groups
    for one, two in itertools.permutations(range(len(ratios)), 2):
        if ratios[one] > ratios[two]:
            assert found[one] >= found[two]


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8, unique=True), st.data())
def test_layers_of_different_sizes_follow_the_formula(
    ratios: list[float], data: st.DataObject
) -> None:
    sizes = [data.draw(st.integers(4, 64)) for _ in ratios]
    layers = [LayerShape(layer=i, num_experts=size, top_k=2) for i, size in enumerate(sizes)]
    counts = [data.draw(st.integers(2, size)) for size in sizes]
    spread = data.draw(st.floats(0.01, 1))
    found = share_by_outliers(layers, counts, np.array(ratios), spread)
    assert sum(found) == sum(counts)
    values, n, u = np.array(ratios), np.array(sizes), np.array(counts)
    stretched = 2 * spread * (values - values.min()) / (values.max() - values.min())
    low, high = np.maximum(-spread, (2 - u) / n), np.minimum(spread, (n - u) / n)

    def total(c: float) -> float:
        return float(n @ np.clip(stretched + c, low, high))

    c = brentq(total, -4, 4, xtol=1e-12)
    exact = u + n * np.clip(stretched + c, low, high)
    assert np.abs(exact - found).max() < 1 + 1e-6


def calibrate(path: Path) -> tuple[Path, Statistics]:
    checkpoint = write_tiny_checkpoint("qwen2_moe", path / "model", num_experts=16)
    random = np.random.Generator(np.random.PCG64(0))
    lines = [" ".join(f"w{i}" for i in random.integers(3, 96, 30)) for _ in range(5)]
    file = path / "task.jsonl"
    file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    task = TaskFile.load("t", file)
    return checkpoint, collect(load_model(checkpoint), [task], load_tokenizer(checkpoint))


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Statistics]:
    return calibrate(tmp_path_factory.mktemp("owl"))


def test_every_method_that_is_given_counts_follows_them(
    measured: tuple[Path, Statistics],
) -> None:
    checkpoint, statistics = measured
    layers = statistics.shape.layers
    counts = [8] * len(layers)
    options: dict[str, Any] = {"layers": "owl", "owl_multiple": 2.0, "owl_range": 0.3}
    small: dict[str, dict[str, Any]] = {
        "naee": {"exhaustive": 0},
        "moe-i2": {"ratios": "given", "generations": 0, "candidates": 1},
    }

    def plan(method: str, limit_bytes: int | None, **more: Any) -> Any:
        def reopen(windows: Sequence[Any]) -> LayerOracle:
            return LayerOracle(open_layers(checkpoint, limit_bytes), windows)

        given = {**small.get(method, {}), **more}
        return make_plan(statistics, "t", method, counts, options=given, open_oracle=reopen)

    windows = statistics.task("t").windows
    ratios = outlier_ratios(LayerOracle(open_layers(checkpoint), windows), 2.0)
    expected = share_by_outliers(layers, counts, ratios, 0.3)
    assert len(set(expected)) > 1
    for method in (name for name, made in METHODS.items() if not made.prunes_width):
        found = plan(method, None, **options)
        assert found.experts_per_layer == expected
        assert found.options.items() >= {"keep_experts": counts, **options}.items()
        if method != "moe-i2":
            uniform = plan(method, None)
            assert uniform.experts_per_layer == tuple(counts)
            assert uniform.to_json() == plan(method, None, layers="uniform").to_json()
            assert set(uniform.options) == {"keep_experts", *METHODS[method].options}
    assert plan("reap", 1, **options).experts_per_layer == expected
    with pytest.raises(PlanError, match="must have the model"):
        make_plan(statistics, "t", "reap", counts, options=options)


def test_what_is_out_of_range_is_refused() -> None:
    def refuse(method: str, *texts: str) -> str:
        with pytest.raises(PlanError) as caught:
            read_options(method, texts)
        return str(caught.value)

    owl = "layers=owl"
    assert read_options("reap", [owl, "owl-range=0.2"]) == {"layers": "owl", "owl_range": 0.2}
    assert read_options("moe-i2", [owl, "ratios=given"])["layers"] == "owl"
    assert "must be uniform for moe-i2, which decides itself" in refuse("moe-i2", owl)
    assert "must be uniform for camera, which keeps all" in refuse("camera", owl)
    assert "layers must be uniform or owl, got 'best'" in refuse("reap", "layers=best")
    assert "owl_range must come with --layers owl" in refuse("reap", "owl-range=0.2")
    assert "reap must be a number, got 'wide'" in refuse("reap", owl, "owl-range=wide")
    assert "reap must be a number, got 'nan'" in refuse("reap", owl, "owl-range=nan")
    assert "in [0, 1], got 8" in refuse("reap", owl, "owl-range=8")
    assert "in (0, inf), got 0" in refuse("reap", owl, "owl-multiple=0")
    assert Owl.from_options({}) is None
