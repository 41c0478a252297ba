"""How far a layer's output moves when it keeps only some of its experts.

With f_j(x_t) the output of expert j for token t, w_tj the gate it has (0 where it is not
routed to) and w'_tj the gate it gets when only the experts of a set S are there, the squared
error of the layer over all tokens is ::

    e(S) = sum_t || sum_j (w_tj - w'_tj) f_j(x_t) ||_2^2
         = sum_t (w_t - w'_t)^T G_t (w_t - w'_t),     G_t[i, j] = <f_i(x_t), f_j(x_t)>

so once every token's Gram matrix G_t is known, a set is judged without running an expert. What
every token uses besides (shared experts) is on both sides and cancels. It is the squared
Frobenius norm that NAEE (https://arxiv.org/abs/2402.14800) and the genetic search of MoE-I²
(https://arxiv.org/abs/2411.01016) minimise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from edgemoe.models.routing.routers import Routing, select

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.oracle.oracle import LayerView

_CHUNK_TOKENS = 64


class Reconstruction:
    """One layer's errors, each set of experts judged once.

    Attributes:
        norm: sum_t of the squared norm of what routed experts give, so that `error / norm`
            compares layers.
    """

    def __init__(self, view: LayerView) -> None:
        """Run every expert on every token.

        Args:
            view: The layer, its weights in memory; it may be forgotten afterwards unless the
                family's router follows none of the known rules.
        """
        self._layer = view.layer
        self._router_calls = view.router_calls
        self._logits = view.routing.logits
        self._bias = _copied(view.layer.correction_bias)
        self._scale = _copied(view.layer.expert_scale)
        self._weights = dense_gates(view.routing, view.layer.num_experts)
        self._gram = token_grams(view.layer, view.hidden)
        self._known: dict[tuple[int, ...], float] = {}
        self.norm = self._quadratic(self._weights)

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(self._gram.shape[1])

    @property
    def evaluated(self) -> int:
        """Number of sets that were evaluated."""
        return len(self._known)

    def forget(self) -> None:
        """Begin anew, as if no set had been judged."""
        self._known.clear()

    def error(self, kept: Sequence[int]) -> float:
        """Judge a set of experts.

        Args:
            kept: Their ids, ascending, as many as the router needs at least.

        Returns:
            e(S), in [0, inf), summed in float64.
        """
        key = tuple(kept)
        if key not in self._known:
            self._known[key] = self._quadratic(self._weights - self.gates(key))
        return self._known[key]

    def gates(self, kept: Sequence[int]) -> torch.Tensor:
        """Route every token among some experts.

        Args:
            kept: Their ids, ascending.

        Returns:
            Gates, float32 [tokens, experts]; 0 for experts that are not used.
        """
        ids = torch.as_tensor(list(kept), dtype=torch.int64)
        routing = self._route(ids)
        dense = dense_gates(routing, len(ids))
        return torch.zeros_like(self._weights).index_copy_(1, ids, dense)

    def _route(self, ids: torch.Tensor) -> Routing:
        layer = self._layer
        if layer.rule is not None:
            further = torch.arange(self.num_experts, self._logits.shape[1])
            left = torch.cat((ids, further))
            return select(
                self._logits[:, left],
                None if self._bias is None else self._bias[left[: len(ids) + layer.rule.idle]],
                layer.rule,
                layer.top_k,
                expert_scale=None if self._scale is None else self._scale[ids],
            )
        with torch.no_grad(), layer.changed(layer.select(ids.tolist())):
            answers = [
                type_routing(*layer.router(*arguments, **options)[:3])
                for arguments, options in self._router_calls
            ]
        return Routing(*(torch.cat(parts) for parts in zip(*answers, strict=True)))

    def _quadratic(self, gates: torch.Tensor) -> float:
        # A token's gates differ in few experts, but a product over all is one call.
        moved = torch.bmm(self._gram, gates.unsqueeze(2)).squeeze(2)
        return float((moved * gates).sum(dtype=torch.float64).clamp_min(0))


def dense_gates(routing: Routing, experts: int) -> torch.Tensor:
    """Spread gates over all experts.

    Args:
        routing: What a router decided.
        experts: How many there are.

    Returns:
        float32 [tokens, experts].
    """
    gates = torch.zeros(len(routing.indices), experts + 1)
    # Unused slots have the number of experts for an id.
    gates.scatter_add_(1, routing.indices, routing.weights.float())
    return gates[:, :experts]


@torch.no_grad()
def token_grams(layer: MoeLayer, hidden: torch.Tensor) -> torch.Tensor:
    """Compute every token's Gram matrix of all experts' outputs.

    Args:
        layer: The layer, its weights in memory.
        hidden: What reaches its experts [tokens, hidden].

    Returns:
        float32 [tokens, experts, experts].
    """
    grams = []
    for chunk in torch.split(hidden, _CHUNK_TOKENS):
        outputs = [layer.expert_output(j, chunk).float() for j in range(layer.num_experts)]
        stacked = torch.stack(outputs, dim=1)
        grams.append(torch.bmm(stacked, stacked.transpose(1, 2)))
    return torch.cat(grams)


def type_routing(logits: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor) -> Routing:
    """Put what a router returned into one form.

    Args:
        logits: [..., experts].
        weights: [..., top_k].
        indices: [..., top_k].

    Returns:
        The same, one row per token, logits in float32.
    """
    rows = (value.reshape(-1, value.shape[-1]) for value in (logits, weights, indices))
    flat_logits, flat_weights, flat_indices = rows
    return Routing(flat_logits.float(), flat_weights, flat_indices)


def _copied(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().float().clone()
