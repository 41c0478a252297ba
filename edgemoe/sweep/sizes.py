"""What a model takes: bytes of its checkpoint, and how much of them routed experts are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.models.layers.width import entry_size
from edgemoe.models.saving import float32_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from edgemoe.models.contract import MoeModel


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        experts: Routed experts of all MoE layers.
        routed_parameters: Their parameters; routers are not counted.
        checkpoint_bytes: Tensors of its checkpoint, in the types that they are stored in;
            headers of the files are not counted.
    """

    experts: int
    routed_parameters: int
    checkpoint_bytes: int

    @classmethod
    def of(
        cls, model: MoeModel, counts: Sequence[int], widths: Sequence[int] | None = None
    ) -> Sizes:
        """Measure a model with other numbers of experts than it has, or narrower ones.

        Args:
            model: The model, possibly on the meta device.
            counts: Experts of each MoE layer.
            widths: Intermediate channels of each of them, padding included; those that the
                layers have by default.

        Returns:
            Its sizes with so many.
        """
        in_float32 = float32_names(model)

        def itemsize(name: str, tensor: torch.Tensor) -> int:
            if name in model.stored_types:
                return model.stored_types[name].itemsize
            as_it_is = name in in_float32 or not tensor.is_floating_point()
            return tensor.element_size() if as_it_is else model.stored_dtype.itemsize

        # Tied tensors are stored once.
        state = model.model.state_dict(keep_vars=True)
        unique = {id(tensor): (name, tensor) for name, tensor in state.items()}
        total = sum(tensor.numel() * itemsize(name, tensor) for name, tensor in unique.values())
        routed = 0
        wide = widths or [layer.intermediate_size for layer in model.layers]
        for layer, count, width in zip(model.layers, counts, wide, strict=True):
            prefix = f"{layer.spec.experts}."
            for spec in layer.spec.tensors:
                if spec.holds_ids:
                    continue
                tensor = layer.tensor(spec.name)
                entry = tensor.numel() // tensor.shape[spec.axis]
                kept = count * entry_size(layer, spec, width)
                lost = layer.num_experts * entry - kept
                total -= lost * itemsize(f"{layer.name}.{spec.name}", tensor)
                if spec.name.startswith(prefix):
                    routed += tensor.numel() - lost
        return cls(experts=sum(counts), routed_parameters=routed, checkpoint_bytes=total)
