"""The experts contract of transformers: how a module of it lays its weights out.

A module decorated with `use_experts_implementation` is called as `experts(hidden [T, H],
top_k_index [T, k], top_k_weights [T, k])` and says of itself whether its experts are gated,
biased, transposed and concatenated. The rest of the kit sees one layout, the canonical one:
`gate_up` [E, 2I, H] with the gate rows before the up rows ([E, I, H] without a gate),
`down` [E, H, I], biases [E, 2I] and [E, H].
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from edgemoe.models.transformers_internals import keeps_experts_contract

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn


@dataclass(frozen=True, kw_only=True)
class ExpertsLayout:
    """Layout of the weights of one experts module.

    Attributes:
        has_gate: Whether the first product has a gate half.
        has_bias: Whether both products have a bias.
        is_transposed: Whether weights are [E, inputs, outputs].
        is_concatenated: Whether gate rows come before up rows, or alternate with them.
    """

    has_gate: bool = True
    has_bias: bool = False
    is_transposed: bool = False
    is_concatenated: bool = True

    @classmethod
    def of(cls, experts: nn.Module) -> ExpertsLayout:
        """Read what the decorator left on a module."""
        return cls(
            has_gate=bool(experts.has_gate),
            has_bias=bool(experts.has_bias),
            is_transposed=bool(experts.is_transposed),
            is_concatenated=bool(experts.is_concatenated),
        )

    @property
    def gate_up_name(self) -> str:
        """Attribute with the weights of the first product."""
        return "gate_up_proj" if self.has_gate else "up_proj"

    @property
    def names(self) -> tuple[str, ...]:
        """Attributes with one entry per expert: first product, second, their biases."""
        weights = (self.gate_up_name, "down_proj")
        return (*weights, *(f"{name}_bias" for name in weights)) if self.has_bias else weights

    def width_axis(self, name: str) -> int | None:
        """Return which axis of a tensor of all experts holds their intermediate channels.

        Args:
            name: One of `names`.

        Returns:
            The axis; None for the bias of the second product, which has none.
        """
        if name.endswith("_bias"):
            return None if name.startswith("down") else 1
        return 1 if name.startswith("down") == self.is_transposed else 2

    def keep_channels(
        self, name: str, tensor: torch.Tensor, neurons: torch.Tensor, width: int
    ) -> torch.Tensor:
        """Keep some of an expert's intermediate channels, and pad it with zeros.

        A channel of zeros adds nothing to the output, whatever the activation makes of it.

        Args:
            name: One of `names`.
            tensor: One expert's, as the module has it.
            neurons: Which to keep, int64 [kept].
            width: Intermediate channels of the result, at least as many.

        Returns:
            As the module has it, with `width` channels.
        """
        if self.width_axis(name) is None:
            return tensor
        tensor = self.to_canonical(name, tensor)
        padding = width - len(neurons)
        if name == "down_proj":
            return self.to_native(name, functional.pad(tensor[:, neurons], (0, padding)))
        parts = 2 if self.has_gate else 1
        halves: torch.Tensor = torch.unflatten(tensor, 0, (parts, -1))[:, neurons]
        before_last = (0, 0) * (halves.ndim - 2)
        padded = functional.pad(halves, (*before_last, 0, padding))
        return self.to_native(name, padded.flatten(0, 1))

    @property
    def is_canonical(self) -> bool:
        """Whether weights are stored as the kit sees them."""
        return not self.is_transposed and (self.is_concatenated or not self.has_gate)

    def to_canonical(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Convert one of the module's tensors to the canonical layout.

        Args:
            name: One of `names`.
            tensor: As the module has it, of all experts or of one.

        Returns:
            The same numbers in canonical order; a view where there is nothing to reorder.
        """
        is_bias = name.endswith("_bias")
        if self.is_transposed and not is_bias:
            tensor = tensor.transpose(-1, -2)
        if not self.is_concatenated and name.startswith("gate_up"):
            tensor = _swap(tensor, -1 if is_bias else -2, (-1, 2))
        return tensor

    def to_native(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """Undo `to_canonical`.

        Args:
            name: One of `names`.
            tensor: In canonical layout, of all experts or of one.

        Returns:
            As the module has it, contiguous.
        """
        is_bias = name.endswith("_bias")
        if not self.is_concatenated and name.startswith("gate_up"):
            tensor = _swap(tensor, -1 if is_bias else -2, (2, -1))
        if self.is_transposed and not is_bias:
            tensor = tensor.transpose(-1, -2)
        return tensor.contiguous()


def _swap(tensor: torch.Tensor, axis: int, sizes: tuple[int, int]) -> torch.Tensor:
    """Read an axis as a table of `sizes`, and write it column by column."""
    table: torch.Tensor = torch.unflatten(tensor, axis, sizes).transpose(axis - 1, axis)
    return table.flatten(axis - 1, axis)


def is_experts_module(module: nn.Module) -> bool:
    """Return whether a module was decorated with `use_experts_implementation`.

    Args:
        module: Any module.

    Returns:
        Whether it keeps the experts contract.
    """
    # The decorator leaves these two on the class and on the instance.
    return is_experts_class(type(module)) and "is_concatenated" in vars(module)


def is_experts_class(candidate: object) -> bool:
    """Return whether a class was decorated with `use_experts_implementation`.

    Args:
        candidate: Anything.

    Returns:
        Whether its instances keep the experts contract.
    """
    return isinstance(candidate, type) and keeps_experts_contract(candidate)


@contextlib.contextmanager
def restored(experts: nn.Module) -> Iterator[None]:
    """Give an experts module its class and its parameters back.

    Args:
        experts: The module; in the block it may get others.

    Yields:
        Nothing. When the block ends the module is as it was.
    """
    family_class, parameters = type(experts), dict(experts._parameters)
    try:
        yield
    finally:
        experts._parameters.clear()
        experts._parameters.update(parameters)
        experts.__class__ = family_class


def reassign_ids(
    table: torch.Tensor, groups: tuple[tuple[int, ...], ...], num_experts: int
) -> torch.Tensor:
    """Rewrite a table of expert ids, as of a router that hashes tokens, for fewer experts.

    An expert that was kept or merged keeps its tokens. A slot of an expert that is gone goes
    to the kept expert after it, cyclically, that the row does not use yet, so that no token
    uses an expert twice while there are enough of them.

    Args:
        table: Expert ids int64 [rows, top_k].
        groups: For each new expert the old experts that it stands for.
        num_experts: How many there were.

    Returns:
        New ids int64 [rows, top_k].
    """
    if table.is_meta:
        return torch.empty_like(table)
    position = {old: new for new, group in enumerate(groups) for old in group}
    kept = torch.tensor([position.get(old, -1) for old in range(num_experts)])
    after = torch.empty(num_experts, dtype=torch.int64)
    following = position[min(position)]
    for old in reversed(range(num_experts)):
        following = position.get(old, following)
        after[old] = following
    new = kept[table]
    for slot in range(table.shape[1]):
        gone = new[:, slot] < 0
        candidate = after[table[gone, slot]]
        others = new[gone]
        for _ in range(len(groups)):
            taken = (others == candidate[:, None]).any(dim=1)
            if not taken.any():
                break
            candidate = torch.where(taken, (candidate + 1) % len(groups), candidate)
        new[gone, slot] = candidate
    return new
