"""A Mixture-of-Experts model as the rest of the kit sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.models.fingerprint import fingerprint_checkpoint, fingerprint_tensors

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.layer import MoeLayer


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """What a plan must know of one MoE layer.

    Attributes:
        layer: Index of the decoder layer.
        num_experts: Routed experts.
        top_k: Experts per token.
        n_group: Groups that the router's experts are divided in.
        min_group_size: Fewest experts per group.
        intermediate_size: Width of its experts; None where it is that of the model.
    """

    layer: int
    num_experts: int
    top_k: int
    n_group: int = 1
    min_group_size: int = 1
    intermediate_size: int | None = None

    @property
    def min_experts(self) -> int:
        """Fewest experts that the layer's router can choose from."""
        return max(self.top_k, self.n_group * self.min_group_size)

    @property
    def least_kept(self) -> int:
        """Fewest experts that a plan may keep: :attr:`min_experts` in whole groups."""
        return -(-self.min_experts // self.n_group) * self.n_group


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The MoE layers of a model, in order.

    Attributes:
        family: Transformers model type.
        layers: One entry per MoE layer; dense decoder layers have none.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of one routed expert, in the layer where they are widest.
    """

    family: str
    layers: tuple[LayerShape, ...]
    hidden_size: int
    intermediate_size: int

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Routed experts of each MoE layer."""
        return tuple(layer.num_experts for layer in self.layers)

    @property
    def widths_per_layer(self) -> tuple[int, ...]:
        """Width of one routed expert of each MoE layer."""
        return tuple(layer.intermediate_size or self.intermediate_size for layer in self.layers)

    def width_of(self, index: int) -> int:
        """Tell how wide the routed experts of a layer are.

        Args:
            index: Of the decoder layer; of one without experts the model's width.

        Returns:
            Their intermediate neurons.
        """
        found = (layer.intermediate_size for layer in self.layers if layer.layer == index)
        return next(found, None) or self.intermediate_size


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
        count_entries: Entries of the configuration that say how many experts there are.
        k_policy: How many experts each token uses; None where it is always top_k.
        follows: Undoes what makes the modules follow the policy.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    family: str
    layers: list[MoeLayer]
    path: Path | None = None
    stored_dtype: torch.dtype = torch.float32
    provenance: Mapping[str, Any] | None = field(default=None, repr=False)
    count_entries: tuple[str, ...] = ()
    k_policy: KPolicy | None = None
    follows: contextlib.ExitStack | None = field(default=None, repr=False)

    @property
    def shape(self) -> ModelShape:
        """What a plan must know of this model."""
        widths = [layer.intermediate_size for layer in self.layers]
        widest = max(widths)
        return ModelShape(
            family=self.family,
            layers=tuple(
                layer.shape
                if width == widest
                else replace(layer.shape, intermediate_size=width)
                for layer, width in zip(self.layers, widths, strict=True)
            ),
            hidden_size=self.layers[0].hidden_size,
            intermediate_size=widest,
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
