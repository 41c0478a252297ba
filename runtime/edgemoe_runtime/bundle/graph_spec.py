"""The model of a bundle, and the inputs and outputs that its graphs have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe_runtime.json_fields import Json, Value


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """The language model.

    Attributes:
        family: transformers' model_type.
        name: for people.
        vocab_size: width of the logits.
        hidden_size: width of the residual stream.
        num_layers: decoder layers.
        max_position_embeddings: longest sequence in tokens.
        bos_token_id: first token of a document, or None.
        eos_token_ids: tokens that end a text; may be empty.
        moe_layers: indices of the decoder layers that have experts, ascending.
        checkpoint_sha256: fingerprint of the checkpoint that was exported.
    """

    family: str
    name: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    moe_layers: tuple[int, ...]
    checkpoint_sha256: str

    @classmethod
    def read(cls, value: Value) -> ModelInfo:
        """Read from JSON."""
        fields = value.fields(
            "family",
            "name",
            "vocab_size",
            "hidden_size",
            "num_layers",
            "max_position_embeddings",
            "bos_token_id",
            "eos_token_ids",
            "moe_layers",
            "checkpoint_sha256",
        )
        return cls(
            family=fields["family"].text(),
            name=fields["name"].text(),
            vocab_size=fields["vocab_size"].integer(1),
            hidden_size=fields["hidden_size"].integer(1),
            num_layers=fields["num_layers"].integer(1),
            max_position_embeddings=fields["max_position_embeddings"].integer(1),
            bos_token_id=fields["bos_token_id"].optional(lambda item: item.integer(0)),
            eos_token_ids=fields["eos_token_ids"].integers(0),
            moe_layers=fields["moe_layers"].integers(0),
            checkpoint_sha256=fields["checkpoint_sha256"].sha256(),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "family": self.family,
            "name": self.name,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "max_position_embeddings": self.max_position_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_ids": list(self.eos_token_ids),
            "moe_layers": list(self.moe_layers),
            "checkpoint_sha256": self.checkpoint_sha256,
        }


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A graph input or output.

    Attributes:
        name: its name in the graph.
        dtype: numpy's name of its type.
        shape: a dimension is a size, or the name of a dynamic one.
        sets_shapes: whether shapes inside the graph follow its values, so that an engine must
            know their range when it is built.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    sets_shapes: bool = False

    @classmethod
    def read(cls, value: Value) -> TensorSpec:
        """Read from JSON."""
        names = ("name", "dtype", "shape")
        # Only written where it is true: most inputs of most bundles set none.
        sets_shapes = "sets_shapes" in value.mapping()
        fields = value.fields(*names, *(("sets_shapes",) if sets_shapes else ()))
        return cls(
            name=fields["name"].text(),
            dtype=fields["dtype"].text(),
            shape=tuple(
                item.text() if isinstance(item.raw(), str) else item.integer(0)
                for item in fields["shape"].items()
            ),
            sets_shapes=sets_shapes and fields["sets_shapes"].boolean(),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        found: dict[str, Json] = {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
        }
        return found | ({"sets_shapes": True} if self.sets_shapes else {})
