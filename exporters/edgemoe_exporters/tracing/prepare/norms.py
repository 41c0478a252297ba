"""RMS norms in a trace: identified by probing, since families store their scale differently."""

from __future__ import annotations

import copy
import itertools
from typing import TYPE_CHECKING, Any

import torch

from edgemoe_exporters.tracing import ops

if TYPE_CHECKING:
    import contextlib

_TOLERANCE = 1e-5
_DEFAULT_WIDTH = 24


def replace_norms(stack: contextlib.ExitStack, model: Any) -> None:
    """Replace every RMS norm over the last axis by a custom op; others stay as they are.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
    """
    known: dict[tuple[Any, ...], tuple[float, float] | None] = {}
    for module in model.modules():
        if not type(module).__name__.endswith("RMSNorm") or list(module.children()):
            continue
        key = (type(module), tuple(sorted(_floats(module).items())))
        if key not in known:
            known[key] = _identify(module)
        found = known[key]
        if found is not None:
            _replace(stack, module, *found)


def _floats(module: Any) -> dict[str, float]:
    return {name: value for name, value in vars(module).items() if type(value) is float}


@torch.no_grad()
def _identify(module: Any) -> tuple[float, float] | None:
    """Return epsilon and offset of the weight; None where it is no RMS norm."""
    parameters = dict(module.named_parameters())
    if set(parameters) - {"weight"}:
        return None
    probe = copy.deepcopy(module).to_empty(device="cpu").float()
    width = parameters["weight"].shape[0] if parameters else _DEFAULT_WIDTH
    draw = torch.Generator().manual_seed(0)
    weight = torch.ones(width)
    if parameters:
        weight = 1 + 0.3 * torch.randn(width, generator=draw)
        probe.weight.copy_(weight)
    # So small that epsilon shows.
    states = 1e-3 * torch.randn(1, 5, width, generator=draw)
    try:
        expected = type(module).forward(probe, states)
    except Exception:  # it takes more than the states
        return None
    for epsilon, offset in itertools.product(_floats(module).values(), (0.0, 1.0)):
        if not parameters and offset:
            continue
        found = ops.rms_norm(states, weight if parameters else None, epsilon, offset)
        if torch.allclose(found, expected, _TOLERANCE):
            return epsilon, offset
    return None


def _replace(stack: contextlib.ExitStack, module: Any, epsilon: float, offset: float) -> None:
    has_weight = bool(dict(module.named_parameters()))

    def forward(states: torch.Tensor) -> torch.Tensor:
        weight = module.weight if has_weight else None
        output: torch.Tensor = ops.rms_norm(states, weight, epsilon, offset)
        return output

    module.forward = forward
    stack.callback(delattr, module, "forward")
