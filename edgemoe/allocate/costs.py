"""What a token would lose with fewer experts, and linear heads that foresee it.

Let token i use the n best of k experts in one layer, where it used all of them. To second
order, with the Hessian at the layer's output replaced by the empirical Fisher matrix g g^T, the
loss then rises by ::

    c_i(n) = 1/2 (g_i . (y_i(k) - y_i(n)))^2

y_i(n) is what the token's n best experts give with the gates that the family gives them, g_i
the gradient of the loss (cross-entropy of the next token) at the layer's output. First-order
terms are left out: the gradient of a trained model has a mean of 0, and its square has not. It
is the estimate of Optimal Brain Damage and of HEAPr (https://arxiv.org/abs/2509.22299), for
experts of one token where those have weights or channels of a layer.

One backward pass gives c_i(n) for all layers. A token that is to be decided has no gradient, so
ridge regression learns it from what the router sees, x_i ::

    min_W  sum_i |c_i - W x_i - b|^2 + r |W|^2

with r chosen between two halves of the tokens, one r for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from edgemoe.allocate.budget import check_tokens
from edgemoe.allocate.heads import Heads
from edgemoe.errors import AllocationError
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.layerwise.provider import whole_model
from edgemoe.models.k_policy import following
from edgemoe.models.loading import quiet_transformers
from edgemoe.models.routing.routers import select
from edgemoe.oracle.gradients import take_gradients
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.oracle.gradients import LayerGradient
    from edgemoe.oracle.oracle import LayerOracle

_RIDGES = tuple(float(10**power) for power in np.arange(-1, 4.1, 0.5))


def fit_heads(
    oracle: LayerOracle, most: Sequence[int], policy: str, *, tokens: int, ridge: float = 0.0
) -> Heads:
    """Fit heads whose scores are what numbers of experts cost, negative and in some unit.

    Args:
        oracle: The model, in memory whole, and the task's tokens.
        most: k of each MoE layer; the model is run with as many.
        policy: Whom errors name.
        tokens: How many tokens to fit to, in [1, inf).
        ridge: r, over the mean square of what routers see, in (0, inf); 0 chooses it.

    Returns:
        The heads, the same unit in all layers.

    Raises:
        AllocationError: An option is out of range, a router follows no known rule, or the
            model answers NaN or infinity.
        StreamingError: The model is larger than memory: gradients go through all of it.
    """
    check_tokens(tokens)
    if not ridge >= 0:
        raise AllocationError(f"ridge must be in [0, inf), got {ridge:g}.")
    check_model(oracle, policy)
    layers = oracle.moe.layers
    halves = oracle.once(
        ("costs", tokens, *most), lambda: sum_costs(oracle.fewer(tokens), most)
    )
    strength = ridge or choose_ridge(halves)
    heads = Heads.zeros(most, layers[0].router_inputs)
    both = [one + other for one, other in zip(*halves, strict=True)]
    fitted = [Ridge(sums).weights(strength) for sums in both]
    # In nats scores are far below 1, and only their order counts.
    largest = max(float(np.abs(weights[-1]).max()) for weights in fitted)
    scale = 1 / largest if largest > 0 else 1.0
    with torch.no_grad():
        for number, weights in enumerate(fitted):
            rows = torch.from_numpy(-scale * weights.T)
            heads.weight[number, : rows.shape[0]] = rows.float()
    return heads


@dataclass
class Sums:
    """Sums over tokens that the ridge regression of one layer needs.

    Attributes:
        inputs: Sum of [x, 1]^T [x, 1], float64 `[hidden + 1, hidden + 1]`.
        products: Sum of [x, 1]^T c, float64 `[hidden + 1, slots]`.
        squares: Sum of c^2, float64 `[slots]`.
    """

    inputs: NDArray[np.float64]
    products: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def zeros(cls, hidden: int, slots: int) -> Sums:
        """Begin with no token."""
        return cls(
            np.zeros((hidden + 1, hidden + 1)), np.zeros((hidden + 1, slots)), np.zeros(slots)
        )

    def add(self, states: NDArray[np.float32], costs: NDArray[np.float64]) -> None:
        """Add tokens: states `[tokens, hidden]`, costs `[tokens, slots]`."""
        rows = np.pad(states.astype(np.float64), ((0, 0), (0, 1)), constant_values=1)
        self.inputs += rows.T @ rows
        self.products += rows.T @ costs
        self.squares += np.square(costs).sum(axis=0)

    def __add__(self, other: Sums) -> Sums:
        return Sums(
            self.inputs + other.inputs,
            self.products + other.products,
            self.squares + other.squares,
        )

    def error(self, weights: NDArray[np.float64]) -> float:
        """Return the squared error of weights `[hidden + 1, slots]` on these tokens."""
        found = np.einsum("hs,hj,js->", weights, self.inputs, weights, optimize=True)
        return float(self.squares.sum() - 2 * (weights * self.products).sum() + found)


def sum_costs(oracle: LayerOracle, most: Sequence[int]) -> tuple[list[Sums], list[Sums]]:
    """Sum up what tokens see and what fewer experts would cost them.

    Args:
        oracle: The model, in memory whole, and the tokens.
        most: How many experts a token uses in each MoE layer where none is left out.

    Returns:
        For each MoE layer, the sums of every other window and those of the rest.

    Raises:
        AllocationError: The model answers NaN or infinity, or no window has two tokens.
    """
    layers = oracle.moe.layers
    slots = tuple(zip(layers, most, strict=True))
    halves = tuple([Sums.zeros(layer.router_inputs, n) for layer, n in slots] for _ in range(2))
    known = [window for window in oracle.windows if len(window.ids) > 1]
    if not known:
        raise AllocationError("costs must be of two tokens of a line or more, got none.")
    with quiet_transformers(), following(oracle.moe, run_with(layers, most)):
        for number, window in enumerate(track(known, "weigh experts")):
            calls = take_gradients(oracle.moe, window)
            for sums, call, n in zip(halves[number % 2], calls, most, strict=True):
                costs = costs_of(call, n)
                if not np.isfinite(costs).all():
                    raise AllocationError(
                        "the model must have finite gradients, got NaN or infinity in layer "
                        f"{call.layer.index}."
                    )
                # Nobody knows what comes after the last token, so nothing tells its cost.
                sums.add(call.router_hidden[:-1].float().cpu().numpy(), costs[:-1])
    return halves[0], halves[1]


def check_model(oracle: LayerOracle, policy: str) -> None:
    """Refuse a model whose costs cannot be measured.

    Args:
        oracle: The model.
        policy: Whom the error names.

    Raises:
        AllocationError: A router follows no known rule.
        StreamingError: The model is larger than memory: gradients go through all of it.
    """
    for layer in oracle.moe.layers:
        if layer.rule is None:
            raise AllocationError(
                f"{policy} must have routers that follow a known rule, got one without in "
                f"layer {layer.index}. Use --policy alloc-l."
            )
    whole_model(oracle.provider, f"{policy}, which takes gradients through it,")


def run_with(layers: Sequence[MoeLayer], numbers: Sequence[int]) -> KPolicy:
    """Make the policy that gives all tokens of a layer as many experts.

    Args:
        layers: The model's MoE layers.
        numbers: Experts per token in each.

    Returns:
        The policy.
    """
    indices = tuple(layer.index for layer in layers)
    rules = tuple(KRule(slots=number) for number in numbers)
    return KPolicy(name="fixed", layers=indices, rules=rules)


@torch.no_grad()
def costs_of(call: LayerGradient, most: int) -> NDArray[np.float64]:
    """Compute what fewer experts would cost each token of a layer.

    Args:
        call: The layer in one pass, in which tokens used `most` experts.
        most: k.

    Returns:
        c(n) for n from 1 to k, in nats, float64 `[tokens, k]`; the last column is 0.
    """
    layer, logits = call.layer, call.routing.logits
    given: dict[str, Any] = {"expert_scale": layer.expert_scale}
    bias, rule = layer.correction_bias, layer.rule
    assert rule is not None
    indices = select(logits, bias, rule, most, **given).indices
    along = torch.zeros(indices.shape, dtype=torch.float64)
    for expert in range(layer.num_experts):
        tokens, slots = torch.where(indices == expert)
        if len(tokens):
            output = layer.expert_output(expert, call.hidden[tokens])
            along[tokens, slots] = (output * call.gradient[tokens]).double().sum(dim=-1).cpu()
    weights = [
        select(logits, bias, rule, most, n, **given).weights.double().cpu()
        for n in range(1, most + 1)
    ]
    # What the layer gives, seen along the gradient.
    gives = torch.stack([(gates * along).sum(dim=-1) for gates in weights], dim=-1)
    found: NDArray[np.float64] = (0.5 * (gives - gives[:, -1:]).square()).numpy()
    return found


class Ridge:
    """Ridge regression of one layer, for any r; the bias is not held back."""

    def __init__(self, sums: Sums) -> None:
        """Prepare for the sums of some tokens, one or more."""
        count = sums.inputs[-1, -1]
        self._mean = sums.inputs[-1, :-1] / count
        self._costs = sums.products[-1] / count
        spread = sums.inputs[:-1, :-1] - count * np.outer(self._mean, self._mean)
        self._values, self._axes = np.linalg.eigh(spread)
        moved = sums.products[:-1] - count * np.outer(self._mean, self._costs)
        self._moved = self._axes.T @ moved
        # Tokens that all see the same say nothing of how costs depend on it.
        self._unit = max(float(self._values.mean()), float(np.finfo(np.float64).tiny))

    def weights(self, ridge: float) -> NDArray[np.float64]:
        """Solve it.

        Args:
            ridge: r, over the mean square of what the router sees, in (0, inf).

        Returns:
            W and b, float64 `[hidden + 1, slots]`.
        """
        held = np.maximum(self._values, 0) + ridge * self._unit
        weights = self._axes @ (self._moved / held[:, None])
        return np.vstack([weights, self._costs - self._mean @ weights])


def choose_ridge(halves: tuple[Sequence[Sums], Sequence[Sums]]) -> float:
    """Choose how much heads are held back: what is best on the half that did not fit them.

    Args:
        halves: Sums of two halves of the tokens, layer by layer.

    Returns:
        r of the smallest squared error, of all layers together, each relative to that of
        heads that are held to their bias; 10 where a half is empty.
    """
    if not all(half[0].inputs[-1, -1] for half in halves):
        return 10.0
    errors = np.zeros(len(_RIDGES))
    for pair in zip(*halves, strict=True):
        for seen, unseen in (pair, pair[::-1]):
            ridge = Ridge(seen)
            constant = unseen.error(ridge.weights(1e12))
            if constant > 0:
                errors += [unseen.error(ridge.weights(r)) / constant for r in _RIDGES]
    return _RIDGES[int(errors.argmin())]
