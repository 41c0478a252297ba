"""A task gives the same on a model in memory, layer by layer, and after an interruption."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from edgemoe.layerwise.batch import Batch
from edgemoe.layerwise.finished_layers import layers_done, read_state
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.layerwise.returned import map_tensors
from edgemoe.layerwise.runner import LayerTask, run_layers
from edgemoe.models.checkpoint import load_model
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.resume import WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.layerwise.returned import Outputs
    from edgemoe.layerwise.runner import Visit

LAYERS = 5
BATCHES = [Batch(torch.arange(3, 3 + length)[None]) for length in (9, 1, 30)]


class Halve(LayerTask):
    """Gives on half of what each layer returns, and keeps the norms of the whole."""

    def __init__(self, interrupted_at: int | None = None) -> None:
        self.norms: dict[int, torch.Tensor] = {}
        self.visited: list[int] = []
        self._interrupted_at = interrupted_at

    def visit(self, visit: Visit) -> Iterator[Outputs]:
        if visit.index == self._interrupted_at:
            raise KeyboardInterrupt
        self.visited.append(visit.index)
        first = list(visit.run())
        found: list[torch.Tensor] = []
        # A layer can be run as often as a task needs.
        for outputs in visit.run():
            map_tensors(outputs, lambda tensor: found.append(tensor.norm()))
            yield map_tensors(outputs, lambda tensor: tensor / 2)
        assert len(first) == len(visit.batches)
        self.norms[visit.index] = torch.stack(found)

    def state(self, index: int) -> dict[str, torch.Tensor]:
        return {"norms": self.norms[index]}

    def restore(self, index: int, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        self.norms[index] = read()["norms"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runner") / "moe"
    return write_tiny_checkpoint("qwen2_moe", path, num_hidden_layers=LAYERS)


def norms(provider: LayerProvider, work: WorkDirectory | None, limit_bytes: int) -> list[float]:
    task = Halve()
    run_layers(provider, BATCHES, task, description="test", work=work, limit_bytes=limit_bytes)
    assert task.visited == list(range(LAYERS))
    return [float(norm) for index in range(LAYERS) for norm in task.norms[index]]


@pytest.mark.parametrize("limit_bytes", [0, 3_000, 1 << 20])
def test_whole_and_streamed_are_the_same(
    checkpoint: Path, tmp_path: Path, limit_bytes: int
) -> None:
    streamed = StreamedLayers(open_streamed(checkpoint))
    whole = norms(InMemoryLayers(load_model(checkpoint)), None, limit_bytes)

    assert norms(streamed, WorkDirectory(tmp_path), limit_bytes) == whole
    assert norms(streamed, None, limit_bytes) == whole
    # Each layer saw half of what the one before it returned.
    assert whole != norms_of_the_model(checkpoint)
    assert all(parameter.is_meta for parameter in streamed.model.parameters())


def norms_of_the_model(checkpoint: Path) -> list[float]:
    class Watch(Halve):
        def visit(self, visit: Visit) -> Iterator[Outputs]:
            for half in super().visit(visit):
                yield map_tensors(half, lambda tensor: tensor * 2)

    task = Watch()
    run_layers(InMemoryLayers(load_model(checkpoint)), BATCHES, task, description="test")
    return [float(norm) for index in range(LAYERS) for norm in task.norms[index]]


@pytest.mark.parametrize("interrupted_at", [0, 1, 3])
def test_an_interrupted_pass_goes_on_after_its_last_finished_layer(
    checkpoint: Path, tmp_path: Path, interrupted_at: int
) -> None:
    streamed, work = StreamedLayers(open_streamed(checkpoint)), WorkDirectory(tmp_path)
    whole = norms(InMemoryLayers(load_model(checkpoint)), None, 0)
    with pytest.raises(KeyboardInterrupt):
        run_layers(streamed, BATCHES, Halve(interrupted_at), description="test", work=work)
    assert layers_done(work) == interrupted_at

    again = Halve()
    run_layers(streamed, BATCHES, again, description="test", work=work)

    assert again.visited == list(range(interrupted_at, LAYERS))
    assert [float(norm) for index in range(LAYERS) for norm in again.norms[index]] == whole
    assert torch.equal(read_state(work, 2)["norms"], again.norms[2])
    # What is finished is not done again, and other batches begin anew.
    finished = Halve()
    run_layers(streamed, BATCHES, finished, description="test", work=work)
    assert finished.visited == []
    other = Halve()
    run_layers(streamed, [*BATCHES, BATCHES[0]], other, description="test", work=work)
    assert other.visited == list(range(LAYERS))


def test_logits_are_those_of_the_model(checkpoint: Path, tmp_path: Path) -> None:
    class Watch(LayerTask):
        watches = True

    def logits_of(provider: LayerProvider) -> list[torch.Tensor]:
        found: list[torch.Tensor] = []
        run_layers(
            provider,
            BATCHES,
            Watch(),
            description="test",
            work=WorkDirectory(tmp_path),
            take=lambda _, logits: found.append(logits),
        )
        return found

    streamed = logits_of(StreamedLayers(open_streamed(checkpoint)))
    whole = logits_of(InMemoryLayers(load_model(checkpoint)))
    for one, other in zip(streamed, whole, strict=True):
        assert torch.equal(one, other)
    assert list(tmp_path.iterdir()) == []
