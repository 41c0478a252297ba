"""The matrices that a layer's output is linear in: the last ones of its experts.

With g_tj the gate of expert j for token t and u_tj what its last matrix D_j is given, routed
experts add sum_j g_tj D_j u_tj to what the layer returns, and a shared expert s_t D u_t, where
s_t is 1 or a gate of its own. So a change of all D at once adds Z C, with columns of Z for each
expert.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.models.factored_experts import factored_units
from edgemoe.models.shared_basis_experts import OUTPUT_BASIS
from edgemoe.oracle.reconstruction import dense_gates
from edgemoe.recover.ridge import Block

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.oracle.oracle import LayerView

_SHARED_NAME = "down_proj"


def routed_tensor(layer: MoeLayer) -> torch.Tensor:
    """Return the down projections of the routed experts, as the family stores them."""
    return layer.tensor(
        f"{layer.spec.experts}.{'down_out' if layer.is_factored else 'down_proj'}"
    )


def shared_modules(layer: MoeLayer) -> list[nn.Linear]:
    """List the down projections in the block that every token uses: shared experts."""
    parts = (layer.experts, layer.router)
    apart = {id(module) for part in parts for module in part.modules()}
    return [
        module
        for name, module in layer.block.named_modules()
        if isinstance(module, nn.Linear)
        and id(module) not in apart
        and name.rpartition(".")[2] == _SHARED_NAME
        and module.out_features == layer.hidden_size
    ]


def routed_blocks(view: LayerView) -> list[Block]:
    """Return the inputs of the routed experts' down projections.

    Args:
        view: The layer on all tokens, its weights in memory.

    Returns:
        A block for each expert: inputs times gates, of the tokens that are routed to it.
    """
    layer = view.layer
    gates = dense_gates(view.routing, layer.num_experts)
    blocks = []
    for expert in range(layer.num_experts):
        rows = torch.nonzero(gates[:, expert]).flatten()
        hidden = view.hidden[rows]
        given = (
            factored_units(layer.experts, layer.layout, expert, hidden)
            if layer.is_factored
            else layer.expert_units(expert, hidden)
        )
        blocks.append(Block(rows, given.float() * gates[rows, expert, None]))
    return blocks


@torch.no_grad()
def add_routed(layer: MoeLayer, changes: Sequence[torch.Tensor]) -> None:
    """Add to the routed experts' down projections.

    Args:
        layer: The layer, which is changed in place.
        changes: One for each expert, float64 [inputs, hidden].
    """
    stored = routed_tensor(layer)
    is_turned = layer.layout.is_transposed and not layer.is_factored
    for expert, change in enumerate(changes):
        if layer.is_based:
            # What is outside the output basis cannot be given.
            basis = layer.experts.get_parameter(OUTPUT_BASIS).double()
            change = torch.linalg.lstsq(basis, change.T).solution.T
        stored[expert].add_((change if is_turned else change.T).to(stored.dtype))


@torch.no_grad()
def add_shared(module: nn.Linear, change: torch.Tensor) -> None:
    """Add to a shared expert's last matrix.

    Args:
        module: The product, which is changed in place.
        change: float64 [inputs, hidden].
    """
    module.weight.add_(change.T.to(module.weight.dtype))


@contextlib.contextmanager
def watching(modules: Sequence[nn.Module]) -> Iterator[list[list[torch.Tensor]]]:
    """Keep what modules are given.

    Args:
        modules: Which.

    Yields:
        For each module what every call gave it, [tokens, inputs].
    """
    given: list[list[torch.Tensor]] = [[] for _ in modules]

    def keeper(kept: list[torch.Tensor]) -> Any:
        def keep(_: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
            kept.append(arguments[0].detach().float().flatten(0, -2).clone())

        return keep

    with contextlib.ExitStack() as stack:
        for module, kept in zip(modules, given, strict=True):
            stack.callback(module.register_forward_pre_hook(keeper(kept)).remove)
        yield given


def gate_of(added: torch.Tensor, expected: torch.Tensor) -> torch.Tensor | None:
    """Find the gate that a shared expert's output is multiplied by.

    Args:
        added: How much the layer's output moved when the expert's output was doubled, float32
            [tokens, hidden].
        expected: The expert's output [tokens, hidden].

    Returns:
        s_t, float32 [tokens]; None where the layer's output is not linear in it, as where a
        norm follows.
    """
    energy = expected.double().square().sum(dim=1)
    gate = (added.double() * expected.double()).sum(dim=1) / energy.clamp_min(1e-30)
    off = (added.double() - gate[:, None] * expected.double()).norm()
    return gate.float() if float(off) <= _LINEAR * float(added.double().norm()) else None


# float32 rounds at 1e-7 of the layer's output, of which the shared expert's may be little.
_LINEAR = 1e-2
