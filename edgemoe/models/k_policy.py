"""Let models follow k policies, and keep these in checkpoints.

A checkpoint that has a policy carries `k_policy.json` beside its weights. transformers does
not look at that file and runs the model with its own top_k; whatever opens the checkpoint
through edgemoe follows the policy.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from edgemoe.errors import CheckpointError
from edgemoe.models.config.k_policy_file import FILE_NAME, read_k_policy, save_k_policy
from edgemoe.models.hooks import follow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.k_policy import KPolicy
    from edgemoe.k_rule import KRule
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer

__all__ = ["FILE_NAME", "read_k_policy", "save_k_policy"]


def put_k_policy(model: MoeModel, policy: KPolicy | None) -> None:
    """Make a model follow a policy until `drop_k_policy`.

    Args:
        model: A model without a policy; it is changed.
        policy: The policy; None changes nothing.

    Raises:
        CheckpointError: It does not fit the model.
    """
    if policy is not None:
        model.follows = _follow_all(model, policy)
        model.k_policy = policy


def drop_k_policy(model: MoeModel) -> None:
    """Make a model's tokens use as many experts as its routers say.

    Args:
        model: A model, with a policy or without; it is changed.
    """
    if model.follows is not None:
        model.follows.close()
    model.follows = model.k_policy = None


@contextlib.contextmanager
def following(model: MoeModel, policy: KPolicy | None) -> Iterator[None]:
    """Make a model follow a policy for a while, and not its own.

    Args:
        model: The model.
        policy: The policy; None for none.

    Yields:
        Nothing. When the block ends the model is as it was.

    Raises:
        CheckpointError: The policy does not fit the model; then nothing has changed.
    """
    own = model.k_policy
    drop_k_policy(model)
    try:
        put_k_policy(model, policy)
        yield
    finally:
        drop_k_policy(model)
        put_k_policy(model, own)


def _follow_all(model: MoeModel, policy: KPolicy) -> contextlib.ExitStack:
    check_k_policy(policy, model.layers)
    stack = contextlib.ExitStack()
    for layer, rule in zip(model.layers, policy.rules, strict=True):
        stack.callback(setattr, layer, "k_rule", None)
        layer.k_rule = rule
        follow(layer, stack)
    return stack


def check_k_policy(policy: KPolicy, layers: Sequence[MoeLayer]) -> None:
    """Check that a model's tokens can be routed so.

    Args:
        policy: The policy.
        layers: The model's MoE layers, possibly on the meta device.

    Raises:
        CheckpointError: They are other layers, or a rule does not fit its layer: its router
            cannot choose as many experts, or follows no known rule and has to for this one, or
            the allocator has another shape.
    """
    found = tuple(layer.index for layer in layers)
    if found != policy.layers:
        raise CheckpointError(
            f"a k policy must name each MoE layer once, got layers {list(policy.layers)} for "
            f"a model with experts in {list(found)}. Make it again with `edgemoe allocate`."
        )
    for layer, rule in zip(layers, policy.rules, strict=True):
        _check_rule(rule, layer)


def most_slots(layer: MoeLayer, experts: int | None = None) -> int:
    """Count the experts that a router could choose for a token, whatever it does now.

    Args:
        layer: The layer.
        experts: How many it would have; as many as it has by default.

    Returns:
        All of them, or those of as many groups as its rule allows; top_k without a known rule.
    """
    if layer.rule is None:
        return layer.top_k
    experts = layer.num_experts if experts is None else experts
    return experts // layer.rule.n_group * layer.rule.topk_group


def _check_rule(rule: KRule, layer: MoeLayer) -> None:
    where = f"layer {layer.index}"
    most = most_slots(layer)
    if not 1 <= rule.slots <= most:
        raise CheckpointError(
            f"{where}: a token must use between 1 and {most} experts, which is what its router "
            f"can choose, got {rule.slots}. Choose fewer."
        )
    if rule.top_p is not None and not 0 < float(np.float32(rule.top_p)) <= 1:
        raise CheckpointError(
            f"{where}: top_p must be in (0, 1], got {rule.top_p:g}. Choose another."
        )
    if not rule.is_fixed and layer.rule is None:
        raise CheckpointError(
            f"{where}: its router must follow a known rule for k to depend on the token, got "
            "one that follows none. Use a fixed k."
        )
    if rule.allocator is not None:
        shape = (rule.slots, layer.router_inputs + 1)
        if rule.allocator.shape != shape:
            raise CheckpointError(
                f"{where}: the allocator must have the shape {shape}, got "
                f"{rule.allocator.shape}. Train it for this model."
            )
