"""What experts do between their two products, found by asking them.

Families write this step in many ways: an activation named in config.json, constants in
attributes, a method of their own. All of them are functions of one hidden unit, so a few
questions to the module's gate (or `experts.act_fn`, where there is no gate) tell which
one it is, and an answer counts only when it then explains every probe.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

from edgemoe.models.transformers_internals import apply_gate

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

    Unary = Callable[[torch.Tensor], torch.Tensor]

# Far beyond every limit that a family sets, and within float32.
_HUGE = 1e4
_SMALL = 1e-3
_TOLERANCE = 2e-6


@dataclass(frozen=True, kw_only=True)
class Activation:
    """A function of an expert's hidden units.

    With a gate it is `act(min(gate, limit)) * (clamp(up, -limit, limit) + beta)`, without
    one `act(up)`; `swish` is `x * sigmoid(alpha * x)`. Soft caps bound the linear factor of a
    gated `swish` and the up half: `cap * tanh(x / cap)` stands for x (Inkling 2).

    Attributes:
        kind: `swish`, `gelu`, `gelu_tanh`, `relu` or `relu2` (its square).
        gated: Whether there is a gate.
        alpha: Slope inside `swish`.
        beta: What is added to the up half.
        limit: Where both halves are cut off; infinity for nowhere.
        gate_softcap: Bound of the gate as a factor; infinity for none.
        up_softcap: Bound of the up half; infinity for none.
    """

    kind: str
    gated: bool = True
    alpha: float = 1.0
    beta: float = 0.0
    limit: float = math.inf
    gate_softcap: float = math.inf
    up_softcap: float = math.inf

    @property
    def is_swiglu(self) -> bool:
        """Whether it is a gated `swish` without soft caps, with whatever constants else."""
        caps = (self.gate_softcap, self.up_softcap)
        return self.gated and self.kind == "swish" and caps == (math.inf, math.inf)

    def __call__(self, gate: torch.Tensor, up: torch.Tensor | None = None) -> torch.Tensor:
        """Apply it to hidden units.

        Args:
            gate: The gate half [..., intermediate]; the only half where there is no gate.
            up: The up half [..., intermediate].

        Returns:
            [..., intermediate].
        """
        if self.limit < math.inf:
            gate = gate.clamp(max=self.limit)
        value = self._unary(gate)
        if up is None:
            return value
        if self.limit < math.inf:
            up = up.clamp(-self.limit, self.limit)
        up = _bounded(up, self.up_softcap)
        return value * (up + self.beta if self.beta else up)

    def _unary(self, value: torch.Tensor) -> torch.Tensor:
        if self.kind == "swish":
            if self.alpha == 1.0 and self.gate_softcap == math.inf:
                return functional.silu(value)
            return _bounded(value, self.gate_softcap) * torch.sigmoid(self.alpha * value)
        return _UNARY[self.kind](value)


def _bounded(value: torch.Tensor, cap: float) -> torch.Tensor:
    return value if cap == math.inf else cap * torch.tanh(value / cap)


_UNARY: dict[str, Unary] = {
    "gelu": functional.gelu,
    "gelu_tanh": lambda value: functional.gelu(value, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda value: functional.relu(value).square(),
}


def find_activation(experts: nn.Module) -> Activation | None:
    """Find out what an experts module does between its two products.

    Args:
        experts: A module that keeps the experts contract, on any device.

    Returns:
        The activation; None where it is none of those that this module knows.
    """
    gated = bool(experts.has_gate)
    if not gated:
        unary = cast("Unary", experts.act_fn)
        probes = _probes()
        for kind in ("swish", *_UNARY):
            activation = Activation(kind=kind, gated=False)
            if _agree(unary(probes), activation(probes)):
                return activation
        return None

    def ask(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        concatenated = bool(experts.is_concatenated)
        both = (
            torch.cat((gate, up), dim=-1)
            if concatenated
            else torch.stack((gate, up), dim=-1).flatten(-2)
        )
        return apply_gate(experts, both)

    gate, up = torch.meshgrid(_probes(), _probes(), indexing="ij")
    answers = ask(gate, up)
    for activation in _candidates(ask):
        if _agree(answers, activation(gate, up)):
            return activation
    return None


def _candidates(
    ask: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> list[Activation]:
    """Read the constants off a few answers."""

    def one(gate: float, up: float) -> float:
        return float(ask(torch.tensor([[gate]]), torch.tensor([[up]])))

    slope = one(1.0, 1.0) - one(1.0, 0.0)
    beta = _rounded(one(1.0, 0.0) / slope) if slope else 0.0
    # With beta known, a huge up half shows where it is cut off.
    limit = one(1.0, _HUGE) / slope - beta if slope else _HUGE
    limit = _rounded(limit) if limit < 0.99 * _HUGE else math.inf
    kinds = [Activation(kind=kind, beta=beta, limit=limit) for kind in _UNARY]
    if 0 < slope < 1:
        alpha = _rounded(math.log(slope / (1 - slope)))
        kinds.insert(0, Activation(kind="swish", alpha=alpha, beta=beta, limit=limit))
    # A huge gate is its cap, and a small up half is itself.
    gate_cap = one(_HUGE, _SMALL) / _SMALL
    if 0 < gate_cap < 0.99 * _HUGE:
        caps = _rounded(gate_cap), _rounded(one(_HUGE, _HUGE) / gate_cap)
        kinds.append(Activation(kind="swish", gate_softcap=caps[0], up_softcap=caps[1]))
    return kinds


def _rounded(value: float) -> float:
    """Take a constant that was measured in float32 for the short number that it was."""
    return float(f"{value:.5g}")


def _probes() -> torch.Tensor:
    return torch.cat((torch.linspace(-12, 12, 49), torch.tensor([-300.0, 0.03, 300.0])))


def _agree(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool(torch.allclose(found, expected, rtol=_TOLERANCE, atol=_TOLERANCE))
