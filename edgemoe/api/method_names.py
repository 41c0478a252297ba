"""Methods and options, which the registries know too: wrong ones are told without torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.errors import AllocationError, EdgemoeError, PlanError, RecoveryError
from edgemoe.plans.options import parse_options
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe.plans.options import Default

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

# Options with their defaults, of those that have any.
OPTIONS: dict[tuple[str, ...], Mapping[str, Mapping[str, Default]]] = {
    PRUNING: {
        "camera": {"alpha": 0.9, "tokens": 8192, "widths": "equal"},
        "heapr": {"tokens": 8192, "widths": "equal"},
        "moe-i2": {
            "ratios": "importance",
            "tokens": 1024,
            "importance_tokens": 512,
            "population": 100,
            "generations": 50,
            "candidates": 3,
            "block": 3,
        },
        "naee": {"tokens": 1024, "exhaustive": 20000},
        "ream": {"tokens": 4096},
    },
    DECOMPOSITION: {
        "shared-basis": {"multiple": 32, "tokens": 8192, "prior_tokens": 1},
        "svd": {"importance": "uniform", "layers": "equal", "multiple": 8},
        "svd-whitened": {
            "importance": "uniform",
            "layers": "equal",
            "multiple": 8,
            "tokens": 8192,
            "prior_tokens": 64,
        },
    },
    POLICIES: {
        "ada-k": {
            "k_max": 0,
            "steps": 64,
            "batch_tokens": 1024,
            "passes": 2,
            "learning_rate": 0.0001,
            "clip": 0.2,
            "gamma": 1.0,
            "regulariser": 0.003,
            "warm": "top-p",
            "warm_epochs": 8,
            "warm_tokens": 4096,
            "warm_rate": 0.001,
        },
        "alloc-l": {"tokens": 1024, "deeper": "one"},
        "fisher": {"tokens": 16384, "ridge": 0.0, "k_max": 0},
        "fixed": {"k": ""},
        "top-p": {"p": 0.0, "k_max": 0, "tokens": 4096},
    },
}
# Every pruning method has these besides.
LAYER_OPTIONS: Mapping[str, Default] = {
    "layers": "uniform",
    "owl_multiple": 5.0,
    "owl_range": 0.08,
}


def check_options(name: str, names: tuple[str, ...], texts: Sequence[str]) -> None:
    """Refuse options that a method does not have, and values of another type.

    Args:
        name: The method, one of `names`.
        names: As in `check_name`.
        texts: `NAME=VALUE` each.

    Raises:
        PlanError: There is one.
    """
    shared = LAYER_OPTIONS if names is PRUNING else {}
    parse_options(name, {**OPTIONS[names].get(name, {}), **shared}, texts)


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
