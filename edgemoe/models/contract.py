"""A Mixture-of-Experts model as the rest of the kit sees it.

Transformers gives every family one experts contract: a module decorated with
``use_experts_implementation``, called as ``experts(hidden [T, H], top_k_index [T, k],
top_k_weights [T, k])``, with the weights of all experts stacked in ``gate_up_proj`` [E, 2I, H]
and ``down_proj`` [E, H, I]. An id equal to E is a sentinel: that slot is skipped. Routers
differ; :class:`RouterRule` says how one of them chooses.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import nn

from edgemoe.errors import CheckpointError
from edgemoe.models.fingerprint import fingerprint_checkpoint, fingerprint_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How a router turns logits into experts and gates.

    Attributes:
        scoring: Function from logits to scores.
        renormalise: Whether the gates of the experts used are divided by their sum.
        scaling_factor: What every gate is multiplied by, last.
        has_correction_bias: Whether a bias per expert is added to the scores, for the choice
            only; gates never contain it.
        n_group: Number of equal, contiguous groups of experts.
        topk_group: Number of groups a token may use, those with the largest sum of their
            two best choice scores.
        min_group_size: Fewest experts with which the family's own router runs.
        softmax_over: Whether the softmax runs over all experts or over those chosen.
    """

    scoring: Literal["softmax", "sigmoid"]
    renormalise: bool
    scaling_factor: float = 1.0
    has_correction_bias: bool = False
    n_group: int = 1
    topk_group: int = 1
    min_group_size: int = 1
    softmax_over: Literal["all", "top_k"] = "all"

    def __post_init__(self) -> None:
        if not 1 <= self.topk_group <= self.n_group:
            raise CheckpointError(
                f"topk_group must be in [1, n_group={self.n_group}], got {self.topk_group}. "
                "Correct config.json."
            )


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a plan must know of one MoE layer.

    Attributes:
        layer: Index of the decoder layer.
        num_experts: Routed experts.
        top_k: Experts per token.
        n_group: Groups that the router's experts are divided in.
        min_group_size: Fewest experts per group.
    """

    layer: int
    num_experts: int
    top_k: int
    n_group: int = 1
    min_group_size: int = 1

    @property
    def min_experts(self) -> int:
        """Fewest experts that the layer's router can choose from."""
        return max(self.top_k, self.n_group * self.min_group_size)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The MoE layers of a model, in order.

    Attributes:
        family: Transformers model type.
        layers: One entry per MoE layer; dense decoder layers have none.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of one routed expert.
    """

    family: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    intermediate_size: int

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Routed experts of each MoE layer."""
        return tuple(layer.num_experts for layer in self.layers)


@dataclass(eq=False, kw_only=True)
class MoeLayer:
    """Live view of one MoE layer; reading goes to the modules, nothing is copied.

    Attributes:
        index: Index of the decoder layer.
        name: Name of the block in the model, such as ``model.layers.3.mlp``.
        block: The MoE block.
        router: The block's router.
        experts: The block's experts module.
        rule: How the router chooses.
        top_k: Experts per token.
        activation: Name of the activation of the gate half.
        shared_parameters: Parameters of the block that every token uses, without the router.
        bias_name: Attribute of the router that holds its correction bias.
    """

    index: int
    name: str
    block: nn.Module
    router: nn.Module
    experts: nn.Module
    rule: RouterRule
    top_k: int
    activation: str
    shared_parameters: int
    bias_name: str | None = None

    @property
    def gate_up(self) -> nn.Parameter:
        """Gate rows, then up rows, of every expert [num_experts, 2 * intermediate, hidden]."""
        return cast("nn.Parameter", self.experts.gate_up_proj)

    @property
    def down(self) -> nn.Parameter:
        """Down projections [num_experts, hidden, intermediate]."""
        return cast("nn.Parameter", self.experts.down_proj)

    @property
    def router_weight(self) -> nn.Parameter:
        """Router rows [num_experts, hidden]."""
        return cast("nn.Parameter", self.router.weight)

    @property
    def correction_bias(self) -> torch.Tensor | None:
        """Bias of the choice scores [num_experts], where the family has one."""
        return (
            None
            if self.bias_name is None
            else cast("torch.Tensor", getattr(self.router, self.bias_name))
        )

    @property
    def num_experts(self) -> int:
        """Routed experts that are present."""
        return int(self.gate_up.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return int(self.gate_up.shape[2])

    @property
    def intermediate_size(self) -> int:
        """Width of one expert."""
        return int(self.gate_up.shape[1]) // 2

    @property
    def shape(self) -> LayerShape:
        """What a plan must know of this layer."""
        return LayerShape(
            layer=self.index,
            num_experts=self.num_experts,
            top_k=self.top_k,
            n_group=self.rule.n_group,
            min_group_size=self.rule.min_group_size,
        )

    def expert_output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one expert, without its gate.

        Args:
            expert: Which, in [0, num_experts).
            hidden: Inputs [tokens, hidden].

        Returns:
            Outputs [tokens, hidden].
        """
        projected = nn.functional.linear(hidden, self.gate_up[expert])
        apply_gate = cast("Callable[[torch.Tensor], torch.Tensor]", self.experts._apply_gate)
        return nn.functional.linear(apply_gate(projected), self.down[expert])

    def replace_experts(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        router_weight: torch.Tensor,
        correction_bias: torch.Tensor | None = None,
    ) -> None:
        """Put other experts in place, with the router rows that choose them.

        Args:
            gate_up: [experts, 2 * intermediate, hidden].
            down: [experts, hidden, intermediate].
            router_weight: [experts, hidden].
            correction_bias: [experts]; needed exactly where the router has one.

        Raises:
            CheckpointError: The tensors do not fit together, or they are fewer than top_k.
        """
        experts, hidden = router_weight.shape
        intermediate = down.shape[-1]
        expected = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
        if (tuple(gate_up.shape), tuple(down.shape)) != expected or hidden != self.hidden_size:
            raise CheckpointError(
                f"{self.name}: experts and router rows must fit together, got gate_up "
                f"{tuple(gate_up.shape)}, down {tuple(down.shape)}, router "
                f"{tuple(router_weight.shape)}."
            )
        if (correction_bias is None) != (self.bias_name is None) or (
            correction_bias is not None and tuple(correction_bias.shape) != (experts,)
        ):
            found = None if correction_bias is None else tuple(correction_bias.shape)
            raise CheckpointError(
                f"{self.name}: the correction bias must have one value for each of the "
                f"{experts} experts exactly where the router has one, got {found}."
            )
        if experts < self.shape.min_experts:
            raise CheckpointError(
                f"{self.name}: a layer must have at least {self.shape.min_experts} experts "
                f"(top_k={self.top_k}), got {experts}. Keep more experts."
            )
        self.experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
        self.experts.down_proj = nn.Parameter(down, requires_grad=False)
        self.router.weight = nn.Parameter(router_weight, requires_grad=False)
        if self.bias_name is not None:
            setattr(self.router, self.bias_name, correction_bias)
        # Both modules size their loops and one-hots by these.
        for module in (self.experts, self.router):
            setattr(module, "num_experts", experts)  # noqa: B010  declared by neither class


@dataclass(eq=False)
class MoeModel:
    """A loaded model, in eval mode, without gradients.

    Attributes:
        model: The transformers model.
        config: Its configuration.
        family: Transformers model type.
        layers: Its MoE layers, in order.
        path: The checkpoint that the weights equal; None once they were changed.
        stored_dtype: Floating type that the checkpoint is stored in.
        provenance: How the checkpoint was made, where edgemoe made it.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    family: str
    layers: list[MoeLayer]
    path: Path | None = None
    stored_dtype: torch.dtype = torch.float32
    provenance: Mapping[str, Any] | None = field(default=None, repr=False)

    @property
    def shape(self) -> ModelShape:
        """What a plan must know of this model."""
        return ModelShape(
            family=self.family,
            layers=tuple(layer.shape for layer in self.layers),
            hidden_size=self.layers[0].hidden_size,
            intermediate_size=self.layers[0].intermediate_size,
        )

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Routed experts of each MoE layer."""
        return self.shape.experts_per_layer

    @cached_property
    def sha256(self) -> str:
        """Fingerprint of the checkpoint; of the tensors in memory where there is none."""
        if self.path is not None:
            return fingerprint_checkpoint(self.path)
        return fingerprint_tensors(self.model.state_dict())
