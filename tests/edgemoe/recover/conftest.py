from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.models import load_model, save_model
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeModel


@pytest.fixture(scope="session")
def write_task() -> Callable[..., TaskFile]:
    """A function that writes a task of random words and loads it."""

    def write(path: Path, *, lines: int = 48, seed: int = 0, name: str = "t") -> TaskFile:
        draw = random.Random(seed)
        with path.open("w") as stream:
            for _ in range(lines):
                length = draw.randint(4, 24)
                words = (f"w{min(95, int(draw.expovariate(0.4)))}" for _ in range(length))
                stream.write(json.dumps({"text": " ".join(words)}) + "\n")
        return TaskFile.load(name, path)

    return write


@pytest.fixture
def task(tmp_path: Path, write_task: Callable[..., TaskFile]) -> TaskFile:
    """A text task of 48 lines."""
    return write_task(tmp_path / "task.jsonl")


@pytest.fixture
def compressed(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A function from a family to a tiny checkpoint, and the same with fewer experts."""

    def make(
        family: str,
        *,
        kind: str = "pruned",
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> tuple[Path, Path]:
        whole, small = tmp_path / f"{family}-whole", tmp_path / f"{family}-{kind}"
        write_tiny_checkpoint(family, whole, dtype=dtype, **changes)
        model = load_model(whole)
        for position, layer in enumerate(model.layers):
            layer.keep(range(layer.shape.min_experts + 2 + position % 2 * (kind == "ragged")))
            if kind == "factored":
                factor_layer(layer, split_by_svd(layer, 6 + position))
        small.mkdir()
        save_model(model, small, source=whole, provenance={"plan_sha256": "0" * 64})
        return whole, small

    return make


@pytest.fixture(scope="session")
def logits_of() -> Callable[[MoeModel], torch.Tensor]:
    """A function from a model to its logits on fixed random tokens."""
    ids = torch.randint(3, VOCAB_SIZE, (2, 17), generator=torch.Generator().manual_seed(3))

    @torch.no_grad()
    def run(model: MoeModel) -> torch.Tensor:
        logits: torch.Tensor = model.model(input_ids=ids, use_cache=False).logits
        return logits

    return run
