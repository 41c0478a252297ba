"""Read the parts of an ONNX file that must be checked, without importing onnx.

A minimal reader of the protobuf wire format: graph inputs and outputs, operator names, and
every tensor that points at external data, wherever the format allows a tensor to be
(initialisers, sparse initialisers, attributes, subgraphs, functions, training graphs).
Bytes are untrusted: everything malformed ends in an IntegrityError, and nesting is bounded.
Field numbers: https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from edgemoe_runtime.errors import IntegrityError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_MAX_DEPTH = 64
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT_BYTES = 10
_EXTERNAL = 1
_DTYPES = {
    1: "float32",
    2: "uint8",
    3: "int8",
    6: "int32",
    7: "int64",
    9: "bool",
    10: "float16",
    11: "float64",
    16: "bfloat16",
}


@dataclass(frozen=True)
class ExternalTensor:
    """A tensor whose data lie in another file: raw key-value pairs, unchecked."""

    name: str
    entries: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class GraphTensor:
    """A graph input or output; a dimension is a size, a name, or None where unknown."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass
class GraphSummary:
    """Inputs, outputs, external tensors and operators of an ONNX file."""

    inputs: list[GraphTensor] = field(default_factory=list["GraphTensor"])
    outputs: list[GraphTensor] = field(default_factory=list["GraphTensor"])
    external: list[ExternalTensor] = field(default_factory=list["ExternalTensor"])
    operators: set[str] = field(default_factory=set[str])


def read_graph(data: bytes, source: str) -> GraphSummary:
    """Summarise a serialised ONNX ModelProto.

    Args:
        data: the file's bytes, untrusted.
        source: what to call the file in errors.

    Raises:
        IntegrityError: when the bytes are not a well-formed model.
    """
    reader = _ModelReader(data, source)
    reader.read()
    return reader.summary


class _ModelReader:
    def __init__(self, data: bytes, source: str) -> None:
        self._data = data
        self._source = source
        self._graphs = 0
        self.summary = GraphSummary()

    def read(self) -> None:
        for number, wire, value, end in self._fields(0, len(self._data)):
            if number == 7:
                self._graphs += 1
                self._message(wire, value, end, 1, self._main_graph)
            elif number == 20:
                self._message(wire, value, end, 1, self._training)
            elif number == 25:
                self._message(wire, value, end, 1, self._function)
        if self._graphs != 1:
            self._refuse(f"hold exactly one graph, got {self._graphs}")

    def _main_graph(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, stop in self._fields(start, end):
            if number in (11, 12):
                into = self.summary.inputs if number == 11 else self.summary.outputs
                self._expect_bytes(wire)
                into.append(self._value_info(value, stop))
        self._graph(start, end, depth)

    def _graph(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, stop in self._fields(start, end):
            if number == 1:
                self._message(wire, value, stop, depth, self._node)
            elif number == 5:
                self._message(wire, value, stop, depth, self._tensor)
            elif number == 15:
                self._message(wire, value, stop, depth, self._sparse_tensor)

    def _training(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, stop in self._fields(start, end):
            if number in (1, 2):
                self._message(wire, value, stop, depth, self._graph)

    def _function(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, stop in self._fields(start, end):
            if number == 7:
                self._message(wire, value, stop, depth, self._node)
            elif number == 11:
                self._message(wire, value, stop, depth, self._attribute)

    def _node(self, start: int, end: int, depth: int) -> None:
        operator, domain = "", ""
        for number, wire, value, stop in self._fields(start, end):
            if number == 4:
                operator = self._text(wire, value, stop)
            elif number == 7:
                domain = self._text(wire, value, stop)
            elif number == 5:
                self._message(wire, value, stop, depth, self._attribute)
        self.summary.operators.add(f"{domain}::{operator}" if domain else operator)

    def _attribute(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, stop in self._fields(start, end):
            if number in (5, 10):
                self._message(wire, value, stop, depth, self._tensor)
            elif number in (6, 11):
                self._message(wire, value, stop, depth, self._graph)
            elif number in (22, 23):
                self._message(wire, value, stop, depth, self._sparse_tensor)

    def _sparse_tensor(self, start: int, end: int, depth: int) -> None:
        for number, wire, value, stop in self._fields(start, end):
            if number in (1, 2):
                self._message(wire, value, stop, depth, self._tensor)

    def _tensor(self, start: int, end: int, depth: int) -> None:
        del depth
        name, external = "", False
        entries: list[tuple[str, str]] = []
        for number, wire, value, stop in self._fields(start, end):
            if number == 8:
                name = self._text(wire, value, stop)
            elif number == 13:
                self._expect_bytes(wire)
                entries.append(self._entry(value, stop))
            elif number == 14 and wire == _VARINT:
                external = external or value == _EXTERNAL
        # entries without the flag count too: protobuf merges repeated messages, and a
        # second occurrence could add the flag
        if external or entries:
            self.summary.external.append(ExternalTensor(name, tuple(entries)))

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        key, text = "", ""
        for number, wire, value, stop in self._fields(start, end):
            if number == 1:
                key = self._text(wire, value, stop)
            elif number == 2:
                text = self._text(wire, value, stop)
        return key, text

    def _value_info(self, start: int, end: int) -> GraphTensor:
        name, dtype = "", "unknown"
        shape: tuple[int | str | None, ...] | None = None
        for number, wire, value, stop in self._fields(start, end):
            if number == 1:
                name = self._text(wire, value, stop)
            elif number == 2:
                self._expect_bytes(wire)
                dtype, shape = self._type(value, stop)
        return GraphTensor(name, dtype, shape)

    def _type(self, start: int, end: int) -> tuple[str, tuple[int | str | None, ...] | None]:
        dtype = "unknown"
        shape: list[int | str | None] | None = None
        for number, wire, value, stop in self._fields(start, end):
            if number != 1:
                continue
            self._expect_bytes(wire)
            for inner, inner_wire, inner_value, inner_stop in self._fields(value, stop):
                if inner == 1 and inner_wire == _VARINT:
                    dtype = _DTYPES.get(inner_value, f"type {inner_value}")
                elif inner == 2:
                    self._expect_bytes(inner_wire)
                    shape = []
                    for dim, dim_wire, dim_start, dim_stop in self._fields(
                        inner_value, inner_stop
                    ):
                        if dim == 1:
                            self._expect_bytes(dim_wire)
                            shape.append(self._dimension(dim_start, dim_stop))
        return dtype, None if shape is None else tuple(shape)

    def _dimension(self, start: int, end: int) -> int | str | None:
        size: int | str | None = None
        for number, wire, value, stop in self._fields(start, end):
            if number == 1 and wire == _VARINT:
                size = value
            elif number == 2:
                size = self._text(wire, value, stop) or None
        return size

    def _message(
        self,
        wire: int,
        start: int,
        end: int,
        depth: int,
        read: Callable[[int, int, int], None],
    ) -> None:
        self._expect_bytes(wire)
        if depth > _MAX_DEPTH:
            self._refuse(f"nest at most {_MAX_DEPTH} messages deep, got more")
        read(start, end, depth + 1)

    def _fields(self, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield (field number, wire type, varint value or start, end of bytes or 0)."""
        position = start
        while position < end:
            tag, position = self._varint(position, end)
            number, wire = tag >> 3, tag & 7
            if tag >> 32:
                # protobuf's own readers drop these bits: they would see another field
                self._refuse("have field tags of 32 bits, got a longer one")
            if number == 0:
                self._refuse("have field numbers above 0, got 0")
            if wire == _VARINT:
                value, position = self._varint(position, end)
                yield number, wire, value, 0
            elif wire == _BYTES:
                length, position = self._varint(position, end)
                if length > end - position:
                    self._refuse(f"hold all of its bytes, got a field cut off at {end}")
                yield number, wire, position, position + length
                position += length
            elif wire in (_FIXED32, _FIXED64):
                width = 4 if wire == _FIXED32 else 8
                if width > end - position:
                    self._refuse(f"hold all of its bytes, got a field cut off at {end}")
                position += width
            else:
                self._refuse(f"use wire types 0, 1, 2 and 5, got {wire}")

    def _varint(self, position: int, end: int) -> tuple[int, int]:
        value = 0
        for index in range(min(_MAX_VARINT_BYTES, end - position)):
            byte = self._data[position + index]
            value |= (byte & 0x7F) << (7 * index)
            if byte < 0x80:
                return value & 0xFFFFFFFFFFFFFFFF, position + index + 1
        self._refuse(f"hold whole numbers, got one cut off at {position}")

    def _text(self, wire: int, start: int, end: int) -> str:
        self._expect_bytes(wire)
        try:
            return self._data[start:end].decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._error("hold UTF-8 names, got other bytes") from error

    def _expect_bytes(self, wire: int) -> None:
        if wire != _BYTES:
            self._refuse(f"follow the ONNX format, got wire type {wire} for a message")

    def _refuse(self, rule: str) -> NoReturn:
        raise self._error(rule)

    def _error(self, rule: str) -> IntegrityError:
        return IntegrityError(
            f"{self._source} must be a well-formed ONNX file: it must {rule}."
            " Copy or export the bundle again."
        )
