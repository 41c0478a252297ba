from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.edgemoe.tiny_oracle import oracle_over, random_moe

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.oracle import LayerOracle


@pytest.fixture(scope="session")
def make_moe() -> Callable[..., MoeModel]:
    """A function from a family to a random model of it."""
    return random_moe


@pytest.fixture
def make_oracle() -> Callable[..., LayerOracle]:
    """A function from a family to an oracle over a random model of it."""

    def make(family: str, **changes: Any) -> LayerOracle:
        return oracle_over(family, (9, 5, 12), **changes)

    return make
