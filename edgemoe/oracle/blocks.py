"""How far a block of decoder layers moves when several of its MoE layers lose experts.

Errors of layers that follow one another do not add: what one layer loses, the next may mend or
make worse. A block is run as the model runs it, with attention, norms and residual
connections, dense layers in between included.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.layerwise.returned import hidden_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe.layerwise.returned import Outputs
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.oracle.oracle import LayerOracle

    # Sets of experts, by MoE layer: each a tuple of kept ids.
    Candidates = Mapping[int, Sequence[tuple[int, ...]]]


def choose_in_blocks(
    oracle: LayerOracle, candidates: Candidates, block: int
) -> dict[int, tuple[int, ...]]:
    """Choose one candidate per MoE layer, jointly within blocks.

    All combinations of a block are run, those that begin alike together; the one whose output
    is nearest, in Frobenius norm, to what the whole model's block returns is chosen. Every
    block starts from what the whole model gives it.

    Args:
        oracle: The model and the tokens.
        candidates: Sets of experts of every MoE layer.
        block: MoE layers in a block, in [1, inf).

    Returns:
        The chosen set of every MoE layer.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    moe = [layer.index for layer in oracle.moe.layers]
    blocks = []
    begin = 0
    for start in range(0, len(moe), block):
        members = moe[start : start + block]
        sets = {index: tuple(candidates[index]) for index in members}
        blocks.append(Block(begin=begin, end=members[-1] + 1, candidates=sets))
        begin = members[-1] + 1
    chosen: dict[int, tuple[int, ...]] = {}
    for found in oracle.map(choose_in_block, blocks, "choose within blocks"):
        chosen |= found
    return chosen


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive decoder layers.

    Attributes:
        begin: The first.
        end: The one after the last.
        candidates: Sets of experts of each MoE layer among them.
    """

    begin: int
    end: int
    candidates: Candidates


def choose_in_block(oracle: LayerOracle, block: Block) -> dict[int, tuple[int, ...]]:
    """Choose one candidate for each MoE layer of one block.

    Args:
        oracle: The model and the tokens, open.
        block: The block.

    Returns:
        The chosen set of every MoE layer.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    states = oracle.states_before(block.begin)
    members = {
        layer.index: layer for layer in oracle.moe.layers if layer.index in block.candidates
    }
    with contextlib.ExitStack() as stack:
        target = states
        for index in range(block.begin, block.end):
            stack.enter_context(oracle.provider.layer(index))
            target = oracle.run_layer(index, target)
        search = _Search(oracle, members, block.candidates, block.end, target)
        search.descend(block.begin, states, {})
    return search.best


class _Search:
    """All combinations of one block."""

    def __init__(
        self,
        oracle: LayerOracle,
        members: Mapping[int, MoeLayer],
        candidates: Candidates,
        end: int,
        target: Sequence[Outputs],
    ) -> None:
        self._oracle = oracle
        self._members = members
        self._candidates = candidates
        self._end = end
        self._target = target
        self.best: dict[int, tuple[int, ...]] = {}
        self.least = float("inf")

    def descend(
        self, index: int, states: Sequence[Outputs], taken: dict[int, tuple[int, ...]]
    ) -> None:
        """Try every candidate of a layer and of those after it."""
        if index == self._end:
            error = squared_distance(states, self._target)
            if error < self.least:
                self.best, self.least = taken, error
            return
        layer = self._members.get(index)
        if layer is None:
            self.descend(index + 1, self._oracle.run_layer(index, states), taken)
            return
        for kept in dict.fromkeys(self._candidates[index]):
            with layer.changed(layer.select(kept)):
                after = self._oracle.run_layer(index, states)
            self.descend(index + 1, after, {**taken, index: kept})


def squared_distance(one: Sequence[Outputs], other: Sequence[Outputs]) -> float:
    """Compare what decoder layers returned.

    Args:
        one: Outputs of every window.
        other: Those of the same windows.

    Returns:
        Sum of the squared differences of the hidden states, in float64.
    """
    return sum(
        float((hidden_of(a) - hidden_of(b)).double().square().sum())
        for a, b in zip(one, other, strict=True)
    )
