from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.calibrate.sample import Window
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models import adapt_model
from edgemoe.oracle.oracle import LayerOracle

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def make_oracle(make_model: Callable[..., Any]) -> Callable[..., LayerOracle]:
    """A function from a family to an oracle over a random model of it."""

    def make(family: str, **changes: Any) -> LayerOracle:
        random = torch.Generator().manual_seed(7)
        windows = [
            Window(
                line=line,
                start=0,
                ids=torch.randint(3, 96, (length,), generator=random).tolist(),
            )
            for line, length in enumerate((19, 7, 24), start=1)
        ]
        return LayerOracle(InMemoryLayers(adapt_model(make_model(family, **changes))), windows)

    return make
