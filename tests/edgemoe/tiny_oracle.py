"""Random models of a family, and oracles over them, for the tests of methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from edgemoe.calibrate.sample import Window
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.models import adapt_model
from edgemoe.models.tiny import VOCAB_SIZE, tiny_config, tiny_model
from edgemoe.oracle.oracle import LayerOracle

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.contract import MoeModel


def draw_windows(lengths: Sequence[int] = (9, 5, 12)) -> list[Window]:
    random = torch.Generator().manual_seed(3)
    return [
        Window(
            line=line,
            start=0,
            ids=torch.randint(3, VOCAB_SIZE, (length,), generator=random).tolist(),
        )
        for line, length in enumerate(lengths, start=1)
    ]


def random_moe(family: str, **changes: Any) -> MoeModel:
    return adapt_model(tiny_model(tiny_config(family, **changes)))


def oracle_over(family: str, lengths: Sequence[int], **changes: Any) -> LayerOracle:
    return LayerOracle(InMemoryLayers(random_moe(family, **changes)), draw_windows(lengths))
