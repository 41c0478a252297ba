"""Send tokens to the experts that they use, in shapes that follow how many those are.

TensorRT builds no op that skips an expert, but it builds ops whose shapes depend on values: a
slot that no token uses is cut off, a place that no token takes is not made. c is the most
slots that any of T tokens uses, E the experts of a layer:

- *slots*: of the k slots of each token the first c are left, and each copies its expert.
  While generating (T = 1) that is the number of experts which the token uses.
- *places*: every expert gets as many places as the busiest one has tokens, C. Tokens are
  gathered into places, experts run as one batched product over [E, C] rows, their weights read
  where they lie, and each token gathers what its slots gave. C falls with c, but more slowly:
  the busiest expert has more than its share.

TensorRT reads `k_cap` on the host then, as it does shapes, and waits for what tokens choose
themselves.
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
# Most numbers of a tensor that TensorRT takes shapes from.
MAX_SHAPE_NUMBERS = 64


@dataclass(frozen=True, kw_only=True)
class Slots:
    """Which experts tokens use.

    Attributes:
        indices: Expert ids, int64 ``[T, k]``.
        gates: float32 ``[T, k]``, 0 where a slot is not used.
        most: Slots that the token with most of them uses, int64 ``[1]``; None where shapes
            cannot follow it.
    """

    indices: ir.Value
    gates: ir.Value
    most: ir.Value | None

    @property
    def top_k(self) -> int:
        """Slots of a token."""
        return size_of(self.indices, 1)

    def in_use(self, emit: Emitter) -> Slots:
        """Cut off the slots that no token uses."""
        if self.most is None:
            return self

        def cut(value: ir.Value) -> ir.Value:
            start, axis = emit.integers(0), emit.integers(1)
            return emit.call("Slice", value, start, self.most, axis)

        return replace(self, indices=cut(self.indices), gates=cut(self.gates))


@dataclass(frozen=True, kw_only=True)
class Places:
    """Tokens gathered by the experts that they use; C places each, of which some stay empty.

    Attributes:
        rows: What stands in each place, float ``[E, C, H]``; anything in an empty one.
        gates: float ``[E, C]``, in the type of activations; 0 in an empty place.
        of_slots: Which of all E C places each slot has, int64 ``[T, k]``; 0 where it has none.
        taken: Whether a slot has a place, bool ``[T, k]``.
        hidden_size: H.
    """

    rows: ir.Value
    gates: ir.Value
    of_slots: ir.Value
    taken: ir.Value
    hidden_size: int

    @classmethod
    def of(cls, emit: Emitter, hidden: ir.Value, slots: Slots, experts: int) -> Places:
        """Give every slot in use a place with its expert, in the order of the tokens.

        Args:
            emit: Takes the nodes.
            hidden: float ``[T, H]``.
            slots: Which experts tokens use.
            experts: E.
        """
        last = emit.integers(-1)
        taken = emit.call("Not", emit.call("Equal", slots.gates, emit.number(0.0)))
        ids = emit.call("Unsqueeze", slots.indices, last)
        here = emit.call("Equal", ids, emit.integers(*range(experts)))
        here = emit.call("And", here, emit.call("Unsqueeze", taken, last))
        # [T, E]: who uses which expert, and with what weight.
        chosen = emit.call(
            "ReduceSum", emit.call("Cast", here, to=FLOAT32), emit.integers(1), keepdims=0
        )
        spread = emit.call(
            "Where", here, emit.call("Unsqueeze", slots.gates, last), emit.number(0.0)
        )
        weights = emit.call("ReduceSum", spread, emit.integers(1), keepdims=0)
        loads = emit.call("ReduceSum", chosen, emit.integers(0), keepdims=0)
        places = emit.call("ReduceMax", loads, emit.integers(0), keepdims=1)
        places = emit.call("Cast", places, to=ir.DataType.INT64)
        # One at least: all gates of a call may have become 0.
        places = emit.call("Max", places, emit.integers(1))
        tokens = emit.call("Squeeze", emit.call("Shape", hidden, start=0, end=1))
        order = emit.call("Range", emit.integer(0), tokens, emit.integer(1))
        # Users of an expert first, in their order: their keys are T, T - 1, ..., the others' 0.
        left = emit.call("Cast", emit.call("Sub", tokens, order), to=FLOAT32)
        by_expert = emit.call("Transpose", chosen, perm=[1, 0])
        keys = emit.call("Mul", by_expert, left)
        # Ordered whole and cut then: TensorRT crashes where k depends on values.
        whole = emit.call("Reshape", tokens, emit.integers(1))
        _, who = emit.call_many("TopK", 2, keys, whole, axis=1)
        who = emit.call("Slice", who, emit.integers(0), places, emit.integers(1))
        gates = emit.call(
            "GatherElements", emit.call("Transpose", weights, perm=[1, 0]), who, axis=1
        )
        # The other way round: which place a token has with an expert, wherever it has one.
        numbers = emit.call("Cast", order, to=FLOAT32)
        numbers = emit.call("Slice", numbers, emit.integers(0), places, emit.integers(0))
        numbers = emit.call("Expand", numbers, emit.call("Shape", who))
        place = emit.call("ScatterElements", by_expert, who, numbers, axis=1)
        place = emit.call("Transpose", place, perm=[1, 0])
        place = emit.call("GatherElements", place, slots.indices, axis=1)
        place = emit.call("Cast", place, to=ir.DataType.INT64)
        place = emit.call("Add", emit.call("Mul", slots.indices, places), place)
        return cls(
            rows=emit.call("Gather", hidden, who, axis=0),
            gates=emit.narrow(gates),
            of_slots=emit.call("Where", taken, place, emit.integer(0)),
            taken=taken,
            hidden_size=size_of(hidden, 1),
        )

    def sum_up(self, emit: Emitter, outputs: ir.Value) -> ir.Value:
        """Give every token the sum of what its places gave.

        Args:
            emit: Takes the nodes.
            outputs: float ``[E, C, H]``, weighed by the gates.

        Returns:
            float ``[T, H]``.
        """
        flat = emit.call("Reshape", outputs, emit.integers(-1, self.hidden_size))
        parts = emit.call("Gather", flat, self.of_slots, axis=0)
        zero = emit.number(0.0, emit.compute)
        taken = emit.call("Unsqueeze", self.taken, emit.integers(-1))
        parts = emit.call("Where", taken, parts, zero)
        return emit.call("ReduceSum", parts, emit.integers(1), keepdims=0)


class Experts(Protocol):
    """The experts of one layer."""

    @property
    def hidden(self) -> ir.Value:
        """What experts get, float ``[T, H]``."""
        ...

    @property
    def experts(self) -> int:
        """E."""
        ...

    def gather(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Copy the expert of every slot; gives ``[T, H]``."""
        ...


class Grouped(Experts, Protocol):
    """Experts that tokens are sent to."""

    def grouped(self, emit: Emitter, places: Places) -> ir.Value:
        """Run all experts on the tokens that have a place with them; gives ``[T, H]``."""
        ...


class Dense(Experts, Protocol):
    """Experts that all tokens see."""

    def dense(self, emit: Emitter, slots: Slots) -> ir.Value:
        """Run all experts on all tokens; gives ``[T, H]``."""
        ...


def run_following(emit: Emitter, layer: Grouped, slots: Slots) -> ir.Value:
    """Copy the experts of each slot where that moves less than reading all of them once.

    Args:
        emit: Takes the nodes.
        layer: The experts.
        slots: Which of them tokens use; ``most`` is known.

    Returns:
        Output ``[T, H]``.
    """
    used = slots.in_use(emit)
    # Not in the branch that needs them: TensorRT takes no shapes from values of a branch.
    places = Places.of(emit, layer.hidden, used, layer.experts)
    if layer.experts < COPY_TRAFFIC:
        return layer.grouped(emit, places)
    tokens = emit.call("Shape", layer.hidden, start=0, end=1)
    moved = emit.call("Mul", emit.call("Mul", tokens, slots.most), emit.integers(COPY_TRAFFIC))
    few = emit.call("LessOrEqual", moved, emit.integers(layer.experts))
    return _either(
        emit,
        layer,
        few,
        lambda to: layer.gather(to, used),
        lambda to: layer.grouped(to, places),
    )


def run_static(emit: Emitter, layer: Dense, slots: Slots) -> ir.Value:
    """Copy the experts of all slots of a few tokens, or run all experts on many.

    Args:
        emit: Takes the nodes.
        layer: The experts.
        slots: Which of them tokens use.

    Returns:
        Output ``[T, H]``.
    """
    most = layer.experts // (COPY_TRAFFIC * slots.top_k)
    if most < 1:
        return layer.dense(emit, slots)
    tokens = emit.call("Shape", layer.hidden, start=0, end=1)
    few = emit.call("LessOrEqual", tokens, emit.integers(most))
    return _either(
        emit,
        layer,
        few,
        lambda to: layer.gather(to, slots),
        lambda to: layer.dense(to, slots),
    )


def gates_by_expert(emit: Emitter, slots: Slots, experts: int) -> ir.Value:
    """Spread gates out over all experts, 0 for those that a token does not use.

    Args:
        emit: Takes the nodes.
        slots: Which experts tokens use.
        experts: E.

    Returns:
        In the type of activations, ``[T, E]``.
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
