"""The cache of a graph: keys and values, and states of other kinds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe_runtime.json_fields import Json, Value


@dataclass(frozen=True, kw_only=True)
class KvLayer:
    """Key-value cache of one decoder layer: [batch, heads, length, key_dim | value_dim]."""

    heads: int
    key_dim: int
    value_dim: int

    @classmethod
    def read(cls, value: Value) -> KvLayer:
        """Read from JSON."""
        fields = value.fields("heads", "key_dim", "value_dim")
        return cls(
            heads=fields["heads"].integer(1),
            key_dim=fields["key_dim"].integer(1),
            value_dim=fields["value_dim"].integer(1),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class CacheState:
    """Something else than keys and values that a decoder layer keeps.

    Attributes:
        name: decoder layer and kind, such as `3.conv_state`; what `past_key_values.` and
            `present.` come before.
        dtype: of its numbers.
        shape: without the batch; None is the number of cached positions.
    """

    name: str
    dtype: str
    shape: tuple[int | None, ...]

    @classmethod
    def read(cls, value: Value) -> CacheState:
        """Read from JSON."""
        fields = value.fields("name", "dtype", "shape")
        return cls(
            name=fields["name"].text(),
            dtype=fields["dtype"].text(),
            shape=tuple(
                size.optional(lambda item: item.integer(1)) for size in fields["shape"].items()
            ),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache at a certain length, for a batch of one.

    Attributes:
        name: what `past_key_values.` and `present.` come before.
        dtype: of its numbers.
        shape: with the batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def past(self) -> str:
        """Name of the graph's input."""
        return f"past_key_values.{self.name}"

    @property
    def present(self) -> str:
        """Name of the graph's output."""
        return f"present.{self.name}"


@dataclass(frozen=True, kw_only=True)
class KvCache:
    """The cache of a graph.

    Attributes:
        form: `shared_buffer`: past and present keys and values may be one preallocated buffer,
            and attention_mask [batch, total] gives the true length; `concat`: present is past
            with the new positions appended.
        dtype: of keys and values.
        layers: one entry per decoder layer, and one for each further time that a layer runs for
            a token; None where it keeps no keys and values.
        states: what else is kept: never shared buffers, present replaces past.
    """

    form: str
    dtype: str
    layers: tuple[KvLayer | None, ...]
    states: tuple[CacheState, ...] = ()

    @classmethod
    def read(cls, value: Value) -> KvCache:
        """Read from JSON."""
        # Absent where there are none, as in bundles of an edgemoe that knew none.
        names = ["states"] if "states" in value.mapping() else []
        fields = value.fields("form", "dtype", "layers", *names)
        return cls(
            form=fields["form"].text(),
            dtype=fields["dtype"].text(),
            layers=tuple(item.optional(KvLayer.read) for item in fields["layers"].items()),
            states=tuple(
                CacheState.read(item) for name in names for item in fields[name].items()
            ),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        document: dict[str, Json] = {
            "form": self.form,
            "dtype": self.dtype,
            "layers": [None if layer is None else layer.to_json() for layer in self.layers],
        }
        if self.states:
            document["states"] = [state.to_json() for state in self.states]
        return document

    def tensors(self, length: int) -> list[CacheTensor]:
        """Return all tensors of the cache.

        Args:
            length: cached positions.
        """
        return [*self.pairs(length), *self.others(length)]

    def pairs(self, length: int) -> list[CacheTensor]:
        """Return keys and values.

        Args:
            length: cached positions.
        """
        return [
            CacheTensor(f"{index}.{kind}", self.dtype, (1, layer.heads, length, width))
            for index, layer in enumerate(self.layers)
            if layer is not None
            for kind, width in (("key", layer.key_dim), ("value", layer.value_dim))
        ]

    def others(self, length: int) -> list[CacheTensor]:
        """Return all but keys and values.

        Args:
            length: cached positions.
        """
        return [
            CacheTensor(
                state.name,
                state.dtype,
                (1, *(length if size is None else size for size in state.shape)),
            )
            for state in self.states
        ]
