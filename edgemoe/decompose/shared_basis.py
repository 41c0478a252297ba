"""shared-basis: one input basis and one output basis for all experts of a layer.

Expert j computes f_j(x) = D_j act(W_j x + a_j) + b_j. With P [R, H] and B [H, R] for inputs and
Q [H, R] for outputs, of rank R < H (see `edgemoe.decompose.projection`), it becomes

    f'_j(x) = Q (D'_j act(W'_j P x + a_j) + b'_j)
    W'_j = W_j B [2I, R],    D'_j = Q^T D_j [R, I],    b'_j = Q^T b_j [R]

so that a layer stores two bases and experts of hidden size R: what
`edgemoe.models.shared_basis_experts` holds, and what any fused kernel runs unchanged. A
bias of the second product is a column of D_j whose activation is always 1: Q is chosen for it
too, and it loses what it has outside of Q.

Mixture of Latent Experts (https://arxiv.org/abs/2503.23100) shares projections between experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from edgemoe.decompose.layer_factors import LayerFactors
from edgemoe.decompose.projection import (
    DEFAULT_RIDGE,
    input_projection,
    output_projection,
    output_second_moment,
)
from edgemoe.decompose.truncation import second_moment
from edgemoe.errors import PlanError
from edgemoe.models.shared_basis_experts import INPUT_BASIS, OUTPUT_BASIS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.oracle.oracle import LayerView

# What fused kernels of every precision take: a block of quantised weights is 32 wide.
RANK_MULTIPLE = 32


@dataclass(frozen=True, kw_only=True)
class SharedBasis:
    """Bases of one layer, and the experts between them.

    Attributes:
        tensors: What `edgemoe.models.layers.shared_basis.to_shared_basis` takes.
        input_lost: Share of sum_j f_j || W_j X ||_F^2 that is gone, in [0, 1].
        output_lost: Share of || Y ||_F^2 that is gone, in [0, 1].
    """

    tensors: dict[str, torch.Tensor]
    input_lost: float
    output_lost: float


@torch.no_grad()
def shared_basis(
    view: LayerView, ranks: Sequence[tuple[int, int]], *, prior_tokens: int = 1
) -> LayerFactors:
    """Find a layer's bases on tokens.

    S is of all tokens that the layer sees, f_j counts those that are routed to expert j, and
    Y is what the routed experts return together, gates included: what the next layer meets.

    Args:
        view: A layer of whole experts on all tokens, its weights in memory; it is not changed.
        ranks: R of both bases, the same pair for every expert.
        prior_tokens: Added to every f_j, in [0, inf), so that an expert which no token of the
            sample reaches is not free to be lost.

    Returns:
        What `edgemoe.models.layers.shared_basis.to_shared_basis` takes, and what the bases
        lose of inputs and of outputs.

    Raises:
        PlanError: The ranks differ.
    """
    found = {rank for pair in ranks for rank in pair}
    if len(found) != 1:
        raise PlanError(
            f"layer {view.layer.index}: experts that share bases must have one rank, got "
            f"{sorted(found)}. Correct the plan."
        )
    counts = [int((view.routing.indices == expert).sum()) for expert in range(len(ranks))]
    answers = _routed_outputs(view)
    bases = share_basis(
        view.layer,
        found.pop(),
        inputs=second_moment(view.hidden),
        outputs=second_moment(answers),
        shares=[count + prior_tokens for count in counts],
    )
    return LayerFactors(bases.tensors, (bases.input_lost, bases.output_lost))


def _routed_outputs(view: LayerView) -> torch.Tensor:
    """Run the routed experts of every token, and add them up by their gates."""
    answers = torch.zeros_like(view.hidden)
    for expert in range(view.layer.num_experts):
        tokens, slots = torch.where(view.routing.indices == expert)
        if len(tokens):
            output = view.layer.expert_output(expert, view.hidden[tokens])
            answers.index_add_(0, tokens, view.routing.weights[tokens, slots, None] * output)
    return answers


@torch.no_grad()
def share_basis(
    layer: MoeLayer,
    rank: int,
    *,
    inputs: torch.Tensor | None = None,
    outputs: torch.Tensor | None = None,
    shares: Sequence[float] | None = None,
    ridge: float = DEFAULT_RIDGE,
) -> SharedBasis:
    """Find a layer's bases, and its experts between them; one expert at a time is float64.

    Args:
        layer: A layer of whole experts, its weights in memory; it is not changed.
        rank: R, in [1, hidden_size].
        inputs: S, float64 [hidden, hidden]: sum of x x^T over what reaches the experts, or its
            mean; None for the variant without data.
        outputs: Y Y^T, float64 [hidden, hidden], likewise of what the routed experts return;
            None for sum_j f_j (D_j D_j^T + b_j b_j^T).
        shares: f_j, one for each expert, in [0, inf); all alike by default. Without `outputs`
            leave it so: how often an expert is used says nothing of how large it answers.
        ridge: See `input_projection`.

    Returns:
        The bases and the experts, in the type of the layer's weights.

    Raises:
        PlanError: The rank, the shares or a moment do not fit the layer, or it has no whole
            experts.
    """
    if layer.is_factored or layer.is_based:
        raise PlanError(
            f"layer {layer.index} must have whole experts of the full hidden size to get "
            "shared bases. Start from the checkpoint that it was made from."
        )
    layout, prefix = layer.layout, layer.spec.experts
    tensors = {name: layer.tensor(f"{prefix}.{name}") for name in layout.names}

    def wide(name: str) -> Iterator[torch.Tensor]:
        for part in tensors[name]:
            yield layout.to_canonical(name, part).double()

    first = layout.gate_up_name
    biases = tensors.get("down_proj_bias")
    into = input_projection(wide(first), rank, second_moment=inputs, shares=shares, ridge=ridge)
    if outputs is None:
        outputs = output_second_moment(wide("down_proj"), biases=biases, shares=shares)
    out = output_projection(outputs, rank)
    like = tensors["down_proj"]
    found = {INPUT_BASIS: into.reduce, OUTPUT_BASIS: out.expand}
    if biases is not None:
        found["down_proj_bias"] = biases.double() @ out.expand
    found = {name: tensor.to(like.dtype).contiguous() for name, tensor in found.items()}
    for name in (first, "down_proj"):
        parts = [
            layout.to_native(
                name, part @ into.expand if name == first else out.reduce @ part
            ).to(like.dtype)
            for part in wide(name)
        ]
        found[name] = torch.stack(parts)
    return SharedBasis(tensors=found, input_lost=into.lost, output_lost=out.lost)


def stored_parameters(
    layer: MoeLayer, rank: int | None = None, *, experts: int | None = None
) -> int:
    """Count the parameters of a layer's routed experts, bases included.

    With E experts of intermediate size I, w = 3 with a gate and 2 without, that is w E I H, and
    between bases w E I R + 2 H R; biases are E (w - 1) I and E H, of which H becomes R.

    Args:
        layer: A layer of whole experts, possibly on the meta device.
        rank: R; None for the experts as they are.
        experts: E; those that the layer has by default.

    Returns:
        How many.
    """
    per_rank, fixed = _slope(layer, experts)
    if rank is None:
        return (per_rank - 2 * layer.hidden_size) * layer.hidden_size + fixed
    return per_rank * rank + fixed


def largest_rank(
    layer: MoeLayer,
    ratio: float,
    *,
    multiple: int = RANK_MULTIPLE,
    experts: int | None = None,
) -> int:
    """Invert `stored_parameters`: what rank leaves a fraction of the parameters.

    Args:
        layer: A layer of whole experts, possibly on the meta device.
        ratio: Fraction of its routed experts' parameters that may be stored, in (0, 1].
        multiple: What divides the rank, in [1, inf).
        experts: Experts that are left; those that the layer has by default.

    Returns:
        The largest such rank R <= hidden_size with `stored_parameters(layer, R) <=
        ratio * stored_parameters(layer)`.

    Raises:
        PlanError: The ratio is not in (0, 1], or leaves less than `multiple`.
    """
    if not 0 < ratio <= 1:
        raise PlanError(
            f"a ratio of parameters must be in (0, 1], got {ratio}. Pass the fraction to keep."
        )
    per_rank, fixed = _slope(layer, experts)
    whole = stored_parameters(layer, experts=experts)
    room = int(ratio * whole) - fixed
    rank = min(room // per_rank, layer.hidden_size) // multiple * multiple
    if rank < multiple:
        least = stored_parameters(layer, multiple, experts=experts) / whole
        raise PlanError(
            f"shared bases of layer {layer.index} must have a rank of at least {multiple}, "
            f"which is {least:.3f} of its experts' parameters, got room for {ratio}. Keep more."
        )
    return rank


def _slope(layer: MoeLayer, experts: int | None) -> tuple[int, int]:
    """Return the parameters for each unit of the rank, and those that do not depend on it."""
    count = layer.num_experts if experts is None else experts
    units, has_bias = layer.intermediate_size, layer.layout.has_bias
    halves = 2 if layer.layout.has_gate else 1
    per_rank = count * ((halves + 1) * units + has_bias) + 2 * layer.hidden_size
    return per_rank, count * halves * units * has_bias
