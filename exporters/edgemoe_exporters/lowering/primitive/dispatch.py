"""Run experts on the tokens that chose them: dispatch and combine with expert capacity.

TensorRT builds no op that skips an expert, but it builds ops with data-dependent shapes, so
that work which no token needs is not computed. c is the most slots that any of T tokens uses,
E the number of experts of a layer:

- *gather*: of the k slots of each token the first c are kept, and each copies its expert's
  weights. While generating (T = 1) that is the number of experts which the token uses.
- *dispatch and combine*, as in GShard (arXiv 2006.16668): tokens are gathered by expert,
  experts run as one batched product over [E, C] rows, their weights read in place, and each
  token sums the outputs of its slots. The expert capacity C is the largest number of tokens of
  any expert, so that none is dropped. C falls with c, but more slowly: load is not balanced.

TensorRT then reads `k_cap` on the host, as it reads shapes, and waits for the device where the
number of experts depends on the token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import onnx_ir as ir

from edgemoe_exporters.graph.builder import FLOAT32, Emitter, size_of

if TYPE_CHECKING:
    from collections.abc import Callable

# A copied expert is read, written and read again.
COPY_TRAFFIC = 3
# Largest tensor, in elements, whose values TensorRT accepts as shapes.
MAX_SHAPE_NUMBERS = 64


@dataclass(frozen=True, kw_only=True)
class Slots:
    """The experts that each token uses.

    Attributes:
        indices: Expert ids, int64 `[T, k]`.
        gates: float32 `[T, k]`, 0 where a slot is not used.
        max_used: The most slots that any token uses, int64 `[1]`; None where shapes must not
            depend on it.
    """

    indices: ir.Value
    gates: ir.Value
    max_used: ir.Value | None

    @property
    def top_k(self) -> int:
        """Slots of a token."""
        return size_of(self.indices, 1)

    def in_use(self, emit: Emitter) -> Slots:
        """Return the slots without those that no token uses."""
        if self.max_used is None:
            return self

        def cut(value: ir.Value) -> ir.Value:
            start, axis = emit.integers(0), emit.integers(1)
            return emit.call("Slice", value, start, self.max_used, axis)

        return replace(self, indices=cut(self.indices), gates=cut(self.gates))


@dataclass(frozen=True, kw_only=True)
class Dispatch:
    """Tokens gathered by expert; each expert has C rows (its capacity), some of them unused.

    Attributes:
        rows: Input of the experts, float `[E, C, H]`; an unused row holds any token.
        gates: In the type of activations, `[E, C]`; 0 in an unused row.
        positions: Row of each slot among all E * C, int64 `[T, k]`; 0 where it has none.
        is_dispatched: Whether a slot has a row, bool `[T, k]`.
        hidden_size: H.
    """

    rows: ir.Value
    gates: ir.Value
    positions: ir.Value
    is_dispatched: ir.Value
    hidden_size: int

    @classmethod
    def of(cls, emit: Emitter, hidden: ir.Value, slots: Slots, experts: int) -> Dispatch:
        """Give every used slot a row of its expert, in the order of the tokens.

        Args:
            emit: Takes the nodes.
            hidden: float `[T, H]`.
            slots: The experts that each token uses.
            experts: E.

        Returns:
            The tokens by expert; capacity is the largest number of tokens of any expert.
        """
        last = emit.integers(-1)
        is_dispatched = emit.call("Not", emit.call("Equal", slots.gates, emit.number(0.0)))
        ids = emit.call("Unsqueeze", slots.indices, last)
        here = emit.call("Equal", ids, emit.integers(*range(experts)))
        here = emit.call("And", here, emit.call("Unsqueeze", is_dispatched, last))
        # [T, E]: which token uses which expert, and with what gate.
        chosen = emit.call(
            "ReduceSum", emit.call("Cast", here, to=FLOAT32), emit.integers(1), keepdims=0
        )
        spread = emit.call(
            "Where", here, emit.call("Unsqueeze", slots.gates, last), emit.number(0.0)
        )
        weights = emit.call("ReduceSum", spread, emit.integers(1), keepdims=0)
        loads = emit.call("ReduceSum", chosen, emit.integers(0), keepdims=0)
        capacity = emit.call("ReduceMax", loads, emit.integers(0), keepdims=1)
        capacity = emit.call("Cast", capacity, to=ir.DataType.INT64)
        # One at least: all gates of a call may have become 0.
        capacity = emit.call("Max", capacity, emit.integers(1))
        tokens = emit.call("Squeeze", emit.call("Shape", hidden, start=0, end=1))
        order = emit.call("Range", emit.integer(0), tokens, emit.integer(1))
        # An expert's tokens come first, in order: their keys are T, T - 1, ..., the others' 0.
        left = emit.call("Cast", emit.call("Sub", tokens, order), to=FLOAT32)
        by_expert = emit.call("Transpose", chosen, perm=[1, 0])
        keys = emit.call("Mul", by_expert, left)
        # Sorted in full and then cut: TensorRT crashes where the k of a TopK is data-dependent.
        whole = emit.call("Reshape", tokens, emit.integers(1))
        _, who = emit.call_many("TopK", 2, keys, whole, axis=1)
        who = emit.call("Slice", who, emit.integers(0), capacity, emit.integers(1))
        gates = emit.call(
            "GatherElements", emit.call("Transpose", weights, perm=[1, 0]), who, axis=1
        )
        # The inverse: the row that a token has with an expert, where it has one.
        numbers = emit.call("Cast", order, to=FLOAT32)
        numbers = emit.call("Slice", numbers, emit.integers(0), capacity, emit.integers(0))
        numbers = emit.call("Expand", numbers, emit.call("Shape", who))
        position = emit.call("ScatterElements", by_expert, who, numbers, axis=1)
        position = emit.call("Transpose", position, perm=[1, 0])
        position = emit.call("GatherElements", position, slots.indices, axis=1)
        position = emit.call("Cast", position, to=ir.DataType.INT64)
        position = emit.call("Add", emit.call("Mul", slots.indices, capacity), position)
        return cls(
            rows=emit.call("Gather", hidden, who, axis=0),
            gates=emit.narrow(gates),
            positions=emit.call("Where", is_dispatched, position, emit.integer(0)),
            is_dispatched=is_dispatched,
            hidden_size=size_of(hidden, 1),
        )

    def combine(self, emit: Emitter, outputs: ir.Value) -> ir.Value:
        """Sum the experts' outputs of every token.

        Args:
            emit: Takes the nodes.
            outputs: float `[E, C, H]`, already multiplied by the gates.

        Returns:
            float `[T, H]`.
        """
        flat = emit.call("Reshape", outputs, emit.integers(-1, self.hidden_size))
        parts = emit.call("Gather", flat, self.positions, axis=0)
        zero = emit.number(0.0, emit.compute)
        is_dispatched = emit.call("Unsqueeze", self.is_dispatched, emit.integers(-1))
        parts = emit.call("Where", is_dispatched, parts, zero)
        return emit.call("ReduceSum", parts, emit.integers(1), keepdims=0)


class Experts(Protocol):
    """The experts of one layer."""

    @property
    def hidden(self) -> ir.Value:
        """Input of the experts, float `[T, H]`."""
        ...

    @property
    def experts(self) -> int:
        """Number of experts, E."""
        ...

    def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Copy the expert of every slot; return the output `[T, H]`."""
        ...


class Grouped(Experts, Protocol):
    """Experts that run on dispatched tokens."""

    def grouped(self, emit: Emitter, dispatch: Dispatch) -> ir.Value:
        """Run all experts on the tokens dispatched to them; return the output `[T, H]`."""
        ...


class Dense(Experts, Protocol):
    """Experts that run on all tokens."""

    def dense(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Run all experts on all tokens; return the output `[T, H]`."""
        ...


def run_dynamic(emit: Emitter, layer: Grouped, slots: Slots) -> ir.Value:
    """Run experts with data-dependent shapes.

    The experts of each slot are copied where that moves less memory than reading all of them
    once; otherwise tokens are dispatched to them.

    Args:
        emit: Takes the nodes.
        layer: The experts.
        slots: Which of them each token uses; `max_used` is known.

    Returns:
        Output `[T, H]`.
    """
    used = slots.in_use(emit)
    # Outside the branch that needs it: TensorRT takes no shapes from values inside a branch.
    dispatch = Dispatch.of(emit, layer.hidden, used, layer.experts)
    if layer.experts < COPY_TRAFFIC:
        return layer.grouped(emit, dispatch)
    tokens = emit.call("Shape", layer.hidden, start=0, end=1)
    moved = emit.call(
        "Mul", emit.call("Mul", tokens, slots.max_used), emit.integers(COPY_TRAFFIC)
    )
    few = emit.call("LessOrEqual", moved, emit.integers(layer.experts))
    return _either(
        emit,
        layer,
        few,
        lambda to: layer.gather(to, used),
        lambda to: layer.grouped(to, dispatch),
    )


def run_static(emit: Emitter, layer: Dense, slots: Slots) -> ir.Value:
    """Run experts with shapes that do not depend on the routing.

    The experts of all slots are copied for few tokens; all experts run on all of many tokens.

    Args:
        emit: Takes the nodes.
        layer: The experts.
        slots: Which of them each token uses.

    Returns:
        Output `[T, H]`.
    """
    max_tokens = layer.experts // (COPY_TRAFFIC * slots.top_k)
    if max_tokens < 1:
        return layer.dense(emit, slots)
    tokens = emit.call("Shape", layer.hidden, start=0, end=1)
    few = emit.call("LessOrEqual", tokens, emit.integers(max_tokens))
    return _either(
        emit,
        layer,
        few,
        lambda to: layer.gather(to, slots),
        lambda to: layer.dense(to, slots),
    )


def gates_by_expert(emit: Emitter, slots: Slots, experts: int) -> ir.Value:
    """Scatter gates over all experts, 0 for those that a token does not use.

    Args:
        emit: Takes the nodes.
        slots: The experts that each token uses.
        experts: E.

    Returns:
        In the type of activations, `[T, E]`.
    """
    ids, last = emit.integers(*range(experts)), emit.integers(-1)
    chosen = emit.call("Equal", emit.call("Unsqueeze", slots.indices, last), ids)
    gates = emit.call("Unsqueeze", slots.gates, last)
    spread = emit.call("Where", chosen, gates, emit.number(0.0))
    return emit.narrow(emit.call("ReduceSum", spread, emit.integers(1), keepdims=0))


def _either(
    emit: Emitter,
    layer: Experts,
    condition: ir.Value,
    then: Callable[[Emitter], ir.Value],
    otherwise: Callable[[Emitter], ir.Value],
) -> ir.Value:
    branches = {}
    for name, lower in (("then", then), ("else", otherwise)):
        inner = emit.branch(name)
        output = lower(inner)
        branches[f"{name}_branch"] = ir.Graph(
            [], [output], nodes=inner.nodes, name=f"{emit.prefix}/{name}"
        )
        output.type = ir.TensorType(emit.compute)
        output.shape = ir.Shape([None, size_of(layer.hidden, 1)])
    return emit.call("If", emit.call("Squeeze", condition), **branches)
