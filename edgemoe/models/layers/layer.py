"""One MoE layer of a loaded model, as the rest of the kit sees it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from edgemoe.errors import CheckpointError
from edgemoe.models.discovery import set_expert_count
from edgemoe.models.experts import reassign_ids
from edgemoe.models.factored_experts import is_factored, run_factored
from edgemoe.models.layers.router_tensors import RouterRoles
from edgemoe.models.layers.width_axis import follow_width, width_axis
from edgemoe.models.shapes import LayerShape
from edgemoe.models.shared_basis_experts import INPUT_BASIS, OUTPUT_BASIS, is_based
from edgemoe.models.transformers_internals import apply_gate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from edgemoe.k_rule import KRule
    from edgemoe.models.activation import Activation
    from edgemoe.models.discovery import LayerSpec
    from edgemoe.models.expert_tensors import ExpertTensor
    from edgemoe.models.experts import ExpertsLayout
    from edgemoe.models.routing.rule import RouterRule


@dataclass(eq=False, kw_only=True)
class MoeLayer(RouterRoles):
    """Live view of one MoE layer; reading goes to the modules, nothing is copied.

    Attributes:
        spec: How the family builds the layer.
        block: The MoE block.
        count_entries: Entries of the configuration that say how many experts there are.
        k_rule: How many experts each token uses; None where it is always `top_k`.
    """

    spec: LayerSpec
    block: nn.Module
    count_entries: tuple[str, ...] = ()
    k_rule: KRule | None = None

    @property
    def index(self) -> int:
        """Index of the decoder layer."""
        return self.spec.index

    @property
    def name(self) -> str:
        """Name of the block in the model, such as `model.layers.3.mlp`."""
        return self.spec.block

    @property
    def experts(self) -> nn.Module:
        """The experts module."""
        return self.block.get_submodule(self.spec.experts)

    @property
    def router(self) -> nn.Module:
        """The router."""
        return self.block.get_submodule(self.spec.router)

    @property
    def rule(self) -> RouterRule | None:
        """How the router chooses; None where it follows none of the rules that are known."""
        return self.spec.routing.rule

    @property
    def by_id(self) -> RouterRule | None:
        """How the router weighs experts that a token's id chooses; None where it chooses."""
        return self.spec.routing.by_id

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return self.spec.routing.top_k

    @property
    def slots(self) -> int:
        """Most experts that any token uses."""
        return self.top_k if self.k_rule is None else self.k_rule.slots

    @property
    def layout(self) -> ExpertsLayout:
        """How the experts module stores its weights."""
        return self.spec.layout

    @property
    def activation(self) -> Activation | None:
        """What experts do between their two products; None where it is not known."""
        return self.spec.activation

    @property
    def is_factored(self) -> bool:
        """Whether each product of an expert is a product of two thinner matrices."""
        return is_factored(self.experts)

    @property
    def is_based(self) -> bool:
        """Whether experts work in a smaller space, between bases that they share."""
        return is_based(self.experts)

    @property
    def basis_rank(self) -> int | None:
        """Size of that space; None where experts work on the hidden size."""
        return int(self._basis(INPUT_BASIS).shape[0]) if self.is_based else None

    @property
    def gate_up(self) -> torch.Tensor:
        """Gate rows, then up rows, of every expert [num_experts, 2 * intermediate, hidden].

        Without a gate, up rows only [num_experts, intermediate, hidden]. Between shared bases
        `basis_rank` stands for hidden, here and in `down`.
        """
        return self._canonical(self.layout.gate_up_name)

    @property
    def down(self) -> torch.Tensor:
        """Down projections [num_experts, hidden, intermediate]."""
        return self._canonical("down_proj")

    @property
    def num_experts(self) -> int:
        """Routed experts that are present."""
        return int(self.tensor(self.counting).shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the experts' input and output."""
        if self.is_factored:
            return int(self.tensor(f"{self.spec.experts}.down_out").shape[1])
        if self.is_based:
            return int(self._basis(INPUT_BASIS).shape[1])
        return int(self.down.shape[1])

    @property
    def intermediate_size(self) -> int:
        """Width of one expert."""
        if self.is_factored:
            return int(self.tensor(f"{self.spec.experts}.down_in").shape[2])
        return int(self.down.shape[2])

    @property
    def shape(self) -> LayerShape:
        """The layer's sizes, as plans see them."""
        return LayerShape(
            layer=self.index,
            num_experts=self.num_experts,
            top_k=self.top_k,
            n_group=self.spec.routing.multiple,
            min_group_size=self.spec.routing.least,
        )

    def tensor(self, name: str) -> torch.Tensor:
        """Return one of the tensors with an entry per expert.

        Args:
            name: From the block on, see `spec.tensors`.

        Returns:
            The parameter or buffer itself.
        """
        module, _, attribute = name.rpartition(".")
        return cast("torch.Tensor", getattr(self.block.get_submodule(module), attribute))

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return everything with an entry per expert, by its name from the block on."""
        return {spec.name: self.tensor(spec.name) for spec in self.spec.tensors}

    def width_axis(self, name: str) -> int | None:
        """Return which axis of a tensor holds intermediate channels, where they may change.

        Args:
            name: From the block on, see `spec.tensors`.

        Returns:
            The axis; None for a tensor without them, and where the layer is factored.
        """
        return None if self.is_factored else width_axis(self.spec, name)

    def expert_output(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one expert, without its gate.

        Args:
            expert: Which, in [0, num_experts).
            hidden: Inputs [tokens, hidden].

        Returns:
            Outputs [tokens, hidden].
        """
        if self.is_factored:
            return run_factored(self.experts, self.layout, expert, hidden)
        activated = self.expert_units(expert, hidden)
        down, bias = self._product_of(expert, "down_proj")
        output = nn.functional.linear(activated, down, bias)
        if self.is_based:
            output = nn.functional.linear(output, self._basis(OUTPUT_BASIS))
        return output

    def expert_units(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """Run one expert up to its second product; its layer must not be factored.

        Args:
            expert: Which, in [0, num_experts).
            hidden: Inputs [tokens, hidden].

        Returns:
            What the second product is given [tokens, intermediate].
        """
        if self.is_based:
            hidden = nn.functional.linear(hidden, self._basis(INPUT_BASIS))
        up, bias = self._product_of(expert, self.layout.gate_up_name)
        return self.activate(nn.functional.linear(hidden, up, bias))

    def activate(self, units: torch.Tensor) -> torch.Tensor:
        """Run what experts do between their two products.

        Args:
            units: What the first product gives, bias included [tokens, 2 * intermediate], or
                [tokens, intermediate] without a gate; in the order of the family.

        Returns:
            What the second product is given [tokens, intermediate].
        """
        if self.layout.has_gate:
            return apply_gate(self.experts, units)
        act = cast("Callable[[torch.Tensor], torch.Tensor]", self.experts.act_fn)
        return act(units)

    def keep(self, ids: Sequence[int]) -> None:
        """Keep some experts, in the order given, with all that belongs to them.

        Args:
            ids: Which, in [0, num_experts).

        Raises:
            CheckpointError: They are fewer than the router can choose from.
        """
        self.replace(self.select(ids))

    def select(self, ids: Sequence[int]) -> dict[str, torch.Tensor]:
        """Copy what belongs to some experts, in the order given.

        Args:
            ids: Which, in [0, num_experts).

        Returns:
            What `replace` takes.
        """
        chosen = torch.tensor(list(ids), dtype=torch.int64)
        groups = tuple((int(expert),) for expert in ids)
        return {
            spec.name: self.regroup(spec, groups, lambda value: value[chosen])
            for spec in self.spec.tensors
        }

    def regroup(
        self,
        spec: ExpertTensor,
        groups: tuple[tuple[int, ...], ...],
        combine: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """Make one tensor for other experts.

        Args:
            spec: Which tensor.
            groups: For each new expert the present ones that it stands for.
            combine: Turns present entries, experts first, into the new ones.

        Returns:
            The new tensor, in the layout of the module.
        """
        value = self.tensor(spec.name)
        if spec.holds_ids:
            return reassign_ids(value, groups, self.num_experts)
        first = value.movedim(spec.axis, 0)
        new = combine(first[: self.num_experts])
        if spec.tail:
            new = torch.cat((new, first[self.num_experts :]))
        return new.movedim(0, spec.axis).contiguous()

    def replace(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Put other experts in place, with all that belongs to them.

        Experts that are not factored may be wider or narrower than those before.

        Args:
            tensors: All of `spec.tensors`, by name, in the layout of the module.

        Raises:
            CheckpointError: The tensors do not fit together, or the experts are fewer than
                the router can choose from.
        """
        experts = int(tensors[self.counting].shape[0])
        width_before, width = self.intermediate_size, self._width_in(tensors)
        for spec in self.spec.tensors:
            value, before = tensors.get(spec.name), self.tensor(spec.name)
            expected = list(before.shape)
            if not spec.holds_ids:
                expected[spec.axis] = experts + spec.tail
            axis = self.width_axis(spec.name)
            if axis is not None:
                expected[axis] = expected[axis] // width_before * width
            if value is None or list(value.shape) != expected:
                raise CheckpointError(
                    f"{self.name}.{spec.name} must have the shape {tuple(expected)} for "
                    f"{experts} experts, got "
                    f"{None if value is None else tuple(value.shape)}."
                )
        if experts < self.shape.min_experts:
            raise CheckpointError(
                f"{self.name}: a layer must have at least {self.shape.min_experts} experts "
                f"(top_k={self.top_k}), got {experts}. Keep more experts."
            )
        for spec in self.spec.tensors:
            self._set(spec.name, tensors[spec.name])
        follow_width(self.experts, width_before, width)
        set_expert_count(self.block, self.spec, self.count_entries, experts)

    @contextlib.contextmanager
    def changed(self, tensors: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Put other experts in place for a while.

        Args:
            tensors: What `replace` takes.

        Yields:
            Nothing. When the block ends the layer is as it was.
        """
        before = self.tensors()
        self.replace(tensors)
        try:
            yield
        finally:
            self.replace(before)

    @property
    def counting(self) -> str:
        """A tensor that has one entry per expert, and nothing else, on its first axis."""
        part = "down_out" if self.is_factored else "down_proj"
        return f"{self.spec.experts}.{part}"

    def _width_in(self, tensors: Mapping[str, torch.Tensor]) -> int:
        """Width of the experts that the layer is about to get; its own where nothing says."""
        axis, given = self.width_axis(self.counting), tensors[self.counting]
        if axis is None or given.ndim <= axis:
            return self.intermediate_size
        return int(given.shape[axis])

    def _product_of(self, expert: int, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One expert's matrix [outputs, inputs], in the family's order of outputs, and bias."""
        prefix = self.spec.experts
        weight = self.tensor(f"{prefix}.{name}")[expert]
        bias = self.tensor(f"{prefix}.{name}_bias")[expert] if self.layout.has_bias else None
        return (weight.T if self.layout.is_transposed else weight), bias

    def _basis(self, name: str) -> torch.Tensor:
        return cast("torch.Tensor", getattr(self.experts, name))

    def _set(self, name: str, value: torch.Tensor) -> None:
        path, _, attribute = name.rpartition(".")
        module = self.block.get_submodule(path)
        if attribute in module._parameters:
            value = nn.Parameter(value, requires_grad=False)
        setattr(module, attribute, value)

    def _canonical(self, name: str) -> torch.Tensor:
        tensor = self.tensor(f"{self.spec.experts}.{name}")
        return tensor if self.layout.is_canonical else self.layout.to_canonical(name, tensor)
