"""Experts whose two products are each a product of two thinner matrices.

A factored experts module keeps the experts contract and the family's own activation; in the
place of its weights it has

    up_in [E, R, H], up_out [E, 2I, R]          first product: up_out @ up_in
    down_in [E, S, I], down_out [E, H, S]       second product: down_out @ down_in

with the rows of ``up_out`` in the order of the family (gate before up, or alternating),
whatever way round the family stores its weights. Experts of smaller rank are padded with zeros.
Biases stay. That is how MoE-I² (https://arxiv.org/abs/2411.01016) stores what SVD leaves.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import CheckpointError
from edgemoe.models.expert_tensors import ExpertTensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from edgemoe.models.discovery import LayerFacts
    from edgemoe.models.experts import ExpertsLayout
    from edgemoe.models.layer import MoeLayer

FACTOR_NAMES = ("up_in", "up_out", "down_in", "down_out")
_MARK = "_edgemoe_factored"


@dataclass(frozen=True)
class Ranks:
    """Ranks of one layer's experts, the largest of them.

    Attributes:
        up: Of the first product.
        down: Of the second product.
    """

    up: int
    down: int


def is_factored(experts: nn.Module) -> bool:
    """Ask whether an experts module was factored."""
    return hasattr(type(experts), _MARK)


def ranks_of(layer: MoeLayer) -> Ranks | None:
    """Return a layer's ranks; None where it is not factored."""
    if not is_factored(layer.experts):
        return None
    experts: Any = layer.experts
    return Ranks(int(experts.up_in.shape[1]), int(experts.down_in.shape[1]))


def product_shapes(layer: MoeLayer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Tell how large an expert's two matrices are.

    Args:
        layer: Any layer.

    Returns:
        Rows (outputs) and columns (inputs) of the first product, whose rows are gate and up
        together where there is a gate, and of the second.
    """
    hidden, units = layer.hidden_size, layer.intermediate_size
    return (units * (2 if layer.layout.has_gate else 1), hidden), (hidden, units)


def factor_layer(layer: MoeLayer, factors: Mapping[str, torch.Tensor]) -> None:
    """Put factors in the place of a layer's weights; the router stays as it is.

    Args:
        layer: The layer; from now on its tensors are the factors.
        factors: All of :data:`FACTOR_NAMES`, as the module says.

    Raises:
        CheckpointError: The factors do not fit together or do not fit the layer.
    """
    if layer.is_factored or layer.is_based:
        raise CheckpointError(
            f"{layer.name} must have whole experts to be factored, got "
            f"{'factored ones' if layer.is_factored else 'some between shared bases'}. Start "
            "from the checkpoint that it was made from."
        )
    experts: Any = layer.experts
    ranks = Ranks(*(factors[name].shape[1] for name in ("up_in", "down_in")))
    for name, shape in _shapes(layer, ranks).items():
        if tuple(factors[name].shape) != shape:
            raise CheckpointError(
                f"{layer.name}: {name} must have the shape {shape}, got "
                f"{tuple(factors[name].shape)}."
            )
    for name in (layer.layout.gate_up_name, "down_proj"):
        delattr(experts, name)
    for name in FACTOR_NAMES:
        experts.register_parameter(name, nn.Parameter(factors[name], requires_grad=False))
    # transformers would initialise what is not there, and check_fit sees what is missing.
    experts._is_hf_initialized = True
    family_class: Any = type(experts)
    experts.__class__ = _factored_class(family_class)
    layer.facts = factored_facts(layer.facts)


@contextlib.contextmanager
def factored(layer: MoeLayer, factors: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put factors in the place of a layer's weights for a while.

    Args:
        layer: The layer.
        factors: What :func:`factor_layer` takes.

    Yields:
        Nothing. When the block ends the layer is as it was.

    Raises:
        CheckpointError: As :func:`factor_layer`.
    """
    experts, facts = layer.experts, layer.facts
    family_class, parameters = type(experts), dict(experts._parameters)
    factor_layer(layer, factors)
    try:
        yield
    finally:
        experts._parameters.clear()
        experts._parameters.update(parameters)
        experts.__class__ = family_class
        layer.facts = facts


def stack_factors(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Put the factors of one product of all experts together.

    Args:
        pairs: Of each expert the inner factor [rank, inputs] and the outer one
            [outputs, rank].

    Returns:
        All inner factors [experts, R, inputs] and all outer ones [experts, outputs, R], where R
        is the largest rank; smaller ones are padded with zeros.
    """
    largest = max(inner.shape[0] for inner, _ in pairs)
    pad = nn.functional.pad
    inner_all = [pad(inner, (0, 0, 0, largest - inner.shape[0])) for inner, _ in pairs]
    outer_all = [pad(outer, (0, largest - outer.shape[1])) for _, outer in pairs]
    return torch.stack(inner_all), torch.stack(outer_all)


def split_by_svd(layer: MoeLayer, rank: int) -> dict[str, torch.Tensor]:
    """Factor each expert's two products by truncated singular value decomposition.

    Args:
        layer: A layer that is not factored.
        rank: Largest rank of both products, in [1, inf).

    Returns:
        What :func:`factor_layer` takes; the nearest factors of that rank in Frobenius norm
        (Eckart and Young), singular values shared evenly between both.
    """
    prefix, layout = layer.facts.experts, layer.layout
    found = {}
    for part, name in (("up", layout.gate_up_name), ("down", "down_proj")):
        weight = layer.tensor(f"{prefix}.{name}")
        if layout.is_transposed:
            weight = weight.transpose(1, 2)
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        kept = min(rank, values.shape[1])
        roots = values[:, :kept].sqrt()
        found[f"{part}_in"] = (roots[:, :, None] * right[:, :kept]).to(weight.dtype)
        found[f"{part}_out"] = (left[:, :, :kept] * roots[:, None, :]).to(weight.dtype)
    return {name: tensor.contiguous() for name, tensor in found.items()}


def factored_facts(facts: LayerFacts) -> LayerFacts:
    """Tell how a layer is built once it is factored."""
    weights = {f"{facts.experts}.{name}" for name in facts.layout.names[:2]}
    kept = [spec for spec in facts.tensors if spec.name not in weights]
    factors = [ExpertTensor(name=f"{facts.experts}.{name}") for name in FACTOR_NAMES]
    return replace(facts, tensors=(*factors, *kept))


def empty_factors(layer: MoeLayer, ranks: Ranks) -> dict[str, torch.Tensor]:
    """Make room for a layer's factors, on the device and in the type of its weights."""
    like = layer.tensor(f"{layer.facts.experts}.down_proj")
    return {name: like.new_empty(shape) for name, shape in _shapes(layer, ranks).items()}


def _shapes(layer: MoeLayer, ranks: Ranks) -> dict[str, tuple[int, int, int]]:
    count = layer.num_experts
    (up_rows, up_columns), (down_rows, down_columns) = product_shapes(layer)
    return {
        "up_in": (count, ranks.up, up_columns),
        "up_out": (count, up_rows, ranks.up),
        "down_in": (count, ranks.down, down_columns),
        "down_out": (count, down_rows, ranks.down),
    }


def run_factored(
    experts: Any, layout: ExpertsLayout, expert: int, hidden: torch.Tensor
) -> torch.Tensor:
    """Run one factored expert, without its gate.

    Args:
        experts: The module.
        layout: How the family stored it before.
        expert: Which.
        hidden: Inputs [tokens, hidden].

    Returns:
        Outputs [tokens, hidden].
    """
    down_bias = experts.down_proj_bias[expert] if layout.has_bias else None
    given = factored_units(experts, layout, expert, hidden)
    return nn.functional.linear(given, experts.down_out[expert], down_bias)


def factored_units(
    experts: Any, layout: ExpertsLayout, expert: int, hidden: torch.Tensor
) -> torch.Tensor:
    """Run one factored expert up to its last factor.

    Args:
        experts: The module.
        layout: How the family stored it before.
        expert: Which.
        hidden: Inputs [tokens, hidden].

    Returns:
        What ``down_out`` is given [tokens, rank].
    """
    linear = nn.functional.linear
    up_bias = (
        getattr(experts, f"{layout.gate_up_name}_bias")[expert] if layout.has_bias else None
    )
    units = linear(linear(hidden, experts.up_in[expert]), experts.up_out[expert], up_bias)
    activated = (experts._apply_gate if layout.has_gate else experts.act_fn)(units)
    return linear(activated, experts.down_in[expert])


@cache
def _factored_class(family_class: Any) -> type[nn.Module]:
    """Derive the family's class with another forward; its activation is inherited."""
    from edgemoe.models.experts import ExpertsLayout

    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        layout = ExpertsLayout.of(self)
        output = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert >= self.up_in.shape[0]:  # a sentinel: the slot is not used
                continue
            token, slot = torch.where(top_k_index == expert)
            value = run_factored(self, layout, expert, hidden_states[token])
            value = value * top_k_weights[token, slot, None]
            output.index_add_(0, token, value.to(output.dtype))
        return output

    members = {"forward": forward, _MARK: True, "__module__": family_class.__module__}
    return type(f"Factored{family_class.__name__}", (family_class,), members)
