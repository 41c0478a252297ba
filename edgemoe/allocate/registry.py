"""The policies by name, and the one call that makes a k policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.allocate.ada_k import ada_k
from edgemoe.allocate.alloc_l import alloc_l
from edgemoe.allocate.fisher import fisher
from edgemoe.allocate.fixed import fixed
from edgemoe.allocate.top_p import top_p
from edgemoe.data_provenance import write_digests
from edgemoe.errors import AllocationError, CheckpointError
from edgemoe.k_policy import KPolicy
from edgemoe.models.k_policy import check_k_policy
from edgemoe.plans.options import options_of, parse_options
from edgemoe.versions import __version__

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemoe.k_rule import KRule
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.resume import WorkDirectory


_MOST_SEEDS = 1 << 32  # with the step behind it, a seed has 64 bits


@dataclass(frozen=True)
class Policy:
    """A way to decide how many experts tokens use.

    Attributes:
        decide: From oracle, mean k (None for the policy's own) and seed to a rule for each MoE
            layer; one that trains gets a work directory after them. Options are keyword
            arguments.
        trains: Whether it takes long enough to be kept on the way.
    """

    decide: Callable[..., tuple[KRule, ...]]
    trains: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Options by name, with their defaults."""
        return options_of(self.decide)


POLICIES: dict[str, Policy] = {
    "ada-k": Policy(ada_k, trains=True),
    "alloc-l": Policy(alloc_l),
    "fisher": Policy(fisher),
    "fixed": Policy(fixed),
    "top-p": Policy(top_p),
}


def find_policy(name: str) -> Policy:
    """Find a policy by name.

    Args:
        name: Its name.

    Returns:
        The policy.

    Raises:
        AllocationError: There is no such policy.
    """
    if name not in POLICIES:
        raise AllocationError(f"the policy must be one of {', '.join(POLICIES)}, got {name!r}.")
    return POLICIES[name]


def read_options(name: str, texts: Sequence[str]) -> dict[str, Any]:
    """Read a policy's options as a command line gives them.

    Args:
        name: The policy's name.
        texts: `NAME=VALUE` each.

    Returns:
        The options by name, in the types of their defaults.

    Raises:
        AllocationError: There is no such policy.
        PlanError: It has no such option, or the value is of another type.
    """
    return parse_options(name, find_policy(name).options, texts)


def allocate(
    oracle: LayerOracle,
    name: str,
    *,
    task: str,
    mean_k: float | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    work: WorkDirectory | None = None,
) -> KPolicy:
    """Decide how many experts tokens use: the same arguments give the same policy.

    Args:
        oracle: The model that will follow the policy, without one of its own, and the task's
            tokens.
        name: One of `POLICIES`.
        task: Name of the task.
        mean_k: Experts per token and layer to aim at; None for the policy's own.
        seed: Seed of policies that draw, in [0, 2**32).
        options: The policy's options by name.
        work: Where a policy that trains is kept on the way; None keeps it nowhere.

    Returns:
        The policy, checked against the model.

    Raises:
        AllocationError: The policy, the mean, an option or the seed is out of range, or the
            model's routers do not allow it.
        StreamingError: The policy cannot run this model's layers.
    """
    policy, given = find_policy(name), dict(options or {})
    if not 0 <= seed < _MOST_SEEDS:
        raise AllocationError(f"the seed must be in [0, {_MOST_SEEDS}), got {seed}.")
    if oracle.moe.k_policy is not None:
        raise AllocationError(
            "the model must have no k policy yet, got one with "
            f"{oracle.moe.k_policy.name}. Start from the checkpoint that it was made from."
        )
    place = (work,) if policy.trains else ()
    rules = policy.decide(oracle, mean_k, seed, *place, **given)
    made = KPolicy(
        name=name,
        layers=tuple(layer.index for layer in oracle.moe.layers),
        rules=rules,
        provenance={
            "task": task,
            "mean_k": mean_k,
            "options": {**policy.options, **given},
            "seed": seed,
            "tokens": oracle.tokens,
            "edgemoe_version": __version__,
            "calibration_lines": write_digests({window.digest for window in oracle.windows}),
        },
    )
    try:
        check_k_policy(made, oracle.moe.layers)
    except CheckpointError as error:
        raise AllocationError(str(error)) from error
    return made
