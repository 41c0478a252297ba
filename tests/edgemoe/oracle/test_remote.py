"""The same answers from this process, from other processes and from a Ray cluster."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.errors import SpreadError, StreamingError
from edgemoe.layerwise.provider import StreamedLayers, open_layers
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.oracle.ablation import loss_increases
from edgemoe.oracle.blocks import choose_in_blocks
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.oracle.remote import WorkerPool
from edgemoe.parallel.opening import open_workers
from edgemoe.parallel.workers import Processes, RayCluster, Workers
from tests.edgemoe.tiny_oracle import draw_windows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

PLACES = [
    Processes(2),
    pytest.param(
        RayCluster(address="local", count=2),
        marks=[
            pytest.mark.slow,
            pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed"),
        ],
    ),
]
SETS = [(0, 1, 2, 3), (4, 5, 6, 7), (0, 2, 4, 6)]


def look(oracle: LayerOracle, index: int) -> tuple[int, torch.Tensor]:
    """Look at a layer from wherever the last look ended."""
    with oracle.visit(index) as view:
        return view.layer.index, view.hidden


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its second decoder layer is dense."""
    path = tmp_path_factory.mktemp("pool") / "model"
    return write_tiny_checkpoint("qwen2_moe", path, mlp_only_layers=[1])


@pytest.fixture(scope="module", params=PLACES, ids=lambda executor: type(executor).__name__)
def workers(request: pytest.FixtureRequest) -> Iterator[Workers]:
    with open_workers(request.param) as opened:
        yield opened


@pytest.fixture
def spread(workers: Workers, checkpoint: Path) -> Callable[..., LayerOracle]:
    """A function from what differs to an oracle whose crew answers."""

    def make(**changes: Any) -> LayerOracle:
        given: dict[str, Any] = {"model": checkpoint, "whole": True, "threads": 1}
        pool = WorkerPool(workers=workers, **{**given, **changes})
        return LayerOracle(open_layers(checkpoint, limit_bytes=1), draw_windows(), pool)

    return make


@pytest.mark.slow
def test_workers_give_the_bits_of_one_process(
    checkpoint: Path, spread: Callable[..., LayerOracle]
) -> None:
    alone, pool = LayerOracle(open_layers(checkpoint), draw_windows()), spread()
    assert isinstance(pool.provider, StreamedLayers)
    for one, other in zip(loss_increases(alone), loss_increases(pool), strict=True):
        assert one.tolist() == other.tolist()
        assert one.max() > 0
    sets = dict.fromkeys((0, 2, 3), SETS)
    for size in (1, 2):
        chosen = choose_in_blocks(alone, sets, size)
        assert choose_in_blocks(pool, sets, size) == chosen
        assert choose_in_blocks(spread(whole=False), sets, size) == chosen
    # Layers in any order, and fewer tokens than the workers hold.
    order = [3, 0, 2, 0, 3]
    for tokens in (26, 11):
        asked = zip(
            alone.fewer(tokens).map(look, order, ""),
            pool.fewer(tokens).map(look, order, ""),
            strict=True,
        )
        for (index, hidden), (other_index, other_hidden) in asked:
            assert index == other_index
            assert len(hidden) == tokens
            assert torch.equal(hidden, other_hidden)


def test_what_a_worker_cannot_do_is_refused(
    spread: Callable[..., LayerOracle], tmp_path: Path
) -> None:
    with pytest.raises(StreamingError, match="must have the whole model in memory"):
        loss_increases(spread(whole=False))
    with pytest.raises(SpreadError, match="the checkpoint must be at the same path"):
        loss_increases(spread(model=tmp_path / "elsewhere"))


def test_a_model_that_changed_in_between_is_run_again(checkpoint: Path) -> None:
    oracle = LayerOracle(open_layers(checkpoint), draw_windows())
    (_, before), *_ = oracle.map(look, [3], "")
    layer = oracle.moe.layers[0]
    with layer.changed(layer.select([0, 1, 2, 3])):
        (_, after), *_ = oracle.map(look, [3], "")
    assert not torch.allclose(before, after)
    assert torch.equal(oracle.map(look, [3], "")[0][1], before)
