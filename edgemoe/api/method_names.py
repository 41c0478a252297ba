"""Names of the methods, which their registries know too: a wrong one is told without torch."""

from __future__ import annotations

from edgemoe.errors import AllocationError, EdgemoeError, PlanError, RecoveryError
from edgemoe_runtime.messages import quote

PRUNING = (
    "camera", "frequency", "heapr", "man", "moe-i2", "msan", "naee", "random", "reap", "ream",
    "seer", "uncurl",
)  # fmt: skip
DECOMPOSITION = ("shared-basis", "svd", "svd-whitened")
POLICIES = ("ada-k", "alloc-l", "fisher", "fixed", "top-p")
RECOVERY = ("least-squares", "lora", "lora+router-kd", "router-kd", "uncurl")

_REFUSALS: dict[tuple[str, ...], tuple[str, type[EdgemoeError]]] = {
    PRUNING: ("method", PlanError),
    DECOMPOSITION: ("method", PlanError),
    POLICIES: ("policy", AllocationError),
    RECOVERY: ("method", RecoveryError),
}


def check_name(name: str, names: tuple[str, ...]) -> None:
    """Refuse a method that there is not.

    Args:
        name: What was asked for.
        names: One of the tuples above.

    Raises:
        PlanError: There is no such pruning method or decomposition.
        AllocationError: There is no such policy.
        RecoveryError: There is no such method of recovery.
    """
    if name not in names:
        noun, error = _REFUSALS[names]
        raise error(f"the {noun} must be one of {', '.join(names)}, got {quote(name)}.")
