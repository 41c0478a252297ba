"""The recovery methods by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import RecoveryError
from edgemoe.recover.least_squares import LEAST_SQUARES
from edgemoe.recover.lora import LORA
from edgemoe.recover.lora_router_kd import LORA_ROUTER_KD
from edgemoe.recover.router_kd import ROUTER_KD
from edgemoe.recover.uncurl import UNCURL

if TYPE_CHECKING:
    from edgemoe.recover.method import RecoveryMethod

METHODS: dict[str, RecoveryMethod] = {
    "least-squares": LEAST_SQUARES,
    "router-kd": ROUTER_KD,
    "lora": LORA,
    "lora+router-kd": LORA_ROUTER_KD,
    "uncurl": UNCURL,
}


def find_method(name: str) -> RecoveryMethod:
    """Find a method by name.

    Args:
        name: Its name.

    Returns:
        The method.

    Raises:
        RecoveryError: There is no such method.
    """
    if name not in METHODS:
        raise RecoveryError(
            f"the method must be one of {', '.join(sorted(METHODS))}, got {name!r}."
        )
    return METHODS[name]
