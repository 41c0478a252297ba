"""A Mixture-of-Experts model as the rest of the kit sees it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.models.shapes import ModelShape
from edgemoe.models.weights.fingerprint import FileHashes, fingerprint_tensors

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedConfig, PreTrainedModel

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.layers.layer import MoeLayer


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
        stored_types: Floating types of its tensors, by their names in the model, where they are
            known: some, such as biases of routers, are more exact than the others.
        config_entries: Entries of the checkpoint's config.json, as it spells them.
        provenance: How the checkpoint was made, where edgemoe made it.
        count_entries: Entries of the configuration that say how many experts there are.
        k_policy: How many experts each token uses; None where it is always top_k.
        follows: Undoes what makes the modules follow the policy.
        hashes: Of the files of `path`, as far as they are known; None where nobody has any.
    """

    model: PreTrainedModel
    config: PreTrainedConfig
    family: str
    layers: list[MoeLayer]
    path: Path | None = None
    stored_dtype: torch.dtype = torch.float32
    stored_types: Mapping[str, torch.dtype] = field(default_factory=dict, repr=False)
    config_entries: Mapping[str, Any] = field(default_factory=dict, repr=False)
    provenance: Mapping[str, Any] | None = field(default=None, repr=False)
    count_entries: tuple[str, ...] = ()
    k_policy: KPolicy | None = None
    follows: contextlib.ExitStack | None = field(default=None, repr=False)
    hashes: FileHashes | None = field(default=None, repr=False)

    @property
    def shape(self) -> ModelShape:
        """The model's MoE layers and sizes, as plans see them."""
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
            return (self.hashes or FileHashes(self.path)).fingerprint()
        return fingerprint_tensors(self.model.state_dict())
