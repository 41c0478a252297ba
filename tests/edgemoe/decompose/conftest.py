from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.calibrate.sample import Window
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models import adapt_model
from edgemoe.models.tiny import VOCAB_SIZE, tiny_config, tiny_model
from edgemoe.oracle.oracle import LayerOracle

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models.contract import MoeModel


def draw_windows(lengths: tuple[int, ...] = (70, 50, 80)) -> list[Window]:
    random = torch.Generator().manual_seed(3)
    return [
        Window(
            line=line,
            start=0,
            ids=torch.randint(3, VOCAB_SIZE, (length,), generator=random).tolist(),
        )
        for line, length in enumerate(lengths, start=1)
    ]


@pytest.fixture(scope="session")
def make_moe() -> Callable[..., MoeModel]:
    """A function from a family to a random model of it."""

    def make(family: str, **changes: Any) -> MoeModel:
        return adapt_model(tiny_model(tiny_config(family, **changes)))

    return make


@pytest.fixture
def make_oracle(make_moe: Callable[..., MoeModel]) -> Callable[..., LayerOracle]:
    """A function from a family to an oracle over a random model of it."""

    def make(family: str, **changes: Any) -> LayerOracle:
        return LayerOracle(InMemoryLayers(make_moe(family, **changes)), draw_windows())

    return make
