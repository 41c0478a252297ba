"""What a layer's router computes with, by its role."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from edgemoe.models.discovery import LayerSpec


class RouterRoles(ABC):
    """The tensors of a router whose rule is known; the base of `MoeLayer`."""

    spec: LayerSpec

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Routed experts that are present."""

    @abstractmethod
    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor by its name from the block on."""

    @property
    def router_weight(self) -> torch.Tensor:
        """Router rows [num_experts, inputs], and further rows, as the rule has them."""
        return self._role("weight")

    @property
    def router_inputs(self) -> int:
        """Width of what the router rows are multiplied with."""
        return int(self.router_weight.shape[1])

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """Bias of the choice scores [num_experts], where the rule has one."""
        return self._optional("correction_bias")

    @property
    def logit_bias(self) -> torch.Tensor | None:
        """Bias of the logits [num_experts], where the rule has one."""
        return self._optional("logit_bias")

    @property
    def expert_scale(self) -> torch.Tensor | None:
        """What gates are multiplied by [num_experts], where the rule has it."""
        scale = self._optional("expert_scale")
        if scale is None and self.gate_scale is not None:
            return self.gate_scale.expand(self.num_experts)
        return scale

    @property
    def gate_scale(self) -> torch.Tensor | None:
        """What all gates are multiplied by [1], where the rule has it."""
        return self._optional("gate_scale")

    def _optional(self, role: str) -> torch.Tensor | None:
        roles = self.spec.routing.tensors
        return None if roles is None or getattr(roles, role) is None else self._role(role)

    def _role(self, role: str) -> torch.Tensor:
        name: str = getattr(self.spec.routing.tensors, role)
        tensor = self.tensor(name)
        return tensor if role == "weight" else tensor.reshape(-1)
