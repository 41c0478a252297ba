"""What a plan must know of a model: its MoE layers, their experts and widths. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """Sizes of one MoE layer, as plans see them.

    Attributes:
        layer: Index of the decoder layer.
        num_experts: Routed experts.
        top_k: Experts per token.
        n_group: Groups that the router's experts are divided in.
        min_group_size: Fewest experts per group: `topk_group` groups of so many hold at least
            top_k where a token may not use all groups.
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
    def least_reason(self) -> str:
        """Why there must be `min_experts`, for messages."""
        if self.min_experts == self.top_k:
            return f"each token uses top_k={self.top_k}"
        return (
            f"its router needs {self.min_group_size} experts in each of {self.n_group} groups "
            f"to choose top_k={self.top_k}"
        )

    @property
    def least_kept(self) -> int:
        """Fewest experts that a plan may keep: `min_experts` in whole groups."""
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
        """Return the width of a layer's routed experts.

        Args:
            index: Of the decoder layer; of one without experts the model's width.

        Returns:
            Their intermediate channels.
        """
        found = (layer.intermediate_size for layer in self.layers if layer.layer == index)
        return next(found, None) or self.intermediate_size


@dataclass(frozen=True)
class Ranks:
    """Ranks of one layer's experts, the largest of them.

    Attributes:
        up: Of the first product.
        down: Of the second product.
    """

    up: int
    down: int
