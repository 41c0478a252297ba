"""The parts of a manifest, each a frozen record that reads and writes its own JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.manifest_ladder import KRung
from edgemoe_runtime.json_fields import Json, Value

if TYPE_CHECKING:
    from collections.abc import Mapping

EXPERTS_USED = "experts_used"
"""Output of graphs whose tokens choose their number of experts; see `Backend.experts_used`."""

ExpertGroup = int | tuple[int, ...]
"""One expert of a task: an id of the checkpoint, or the ids that were merged into it."""


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
            eos_token_ids=_integers(fields["eos_token_ids"], 0),
            moe_layers=_integers(fields["moe_layers"], 0),
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


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """How far the exported graph is from its reference.

    Attributes:
        max_abs_logit_difference: largest absolute difference of any logit.
        tokens: positions compared.
        reference: what it was compared with, such as "eager fp32".
    """

    max_abs_logit_difference: float
    tokens: int
    reference: str

    @classmethod
    def read(cls, value: Value) -> ParityReport:
        """Read from JSON."""
        fields = value.fields("max_abs_logit_difference", "tokens", "reference")
        return cls(
            max_abs_logit_difference=fields["max_abs_logit_difference"].number(),
            tokens=fields["tokens"].integer(1),
            reference=fields["reference"].text(),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class DataInfo:
    """Held-out data on which quality was judged."""

    file: str
    sha256: str
    lines: int

    @classmethod
    def read(cls, value: Value) -> DataInfo:
        """Read from JSON."""
        fields = value.fields("file", "sha256", "lines")
        return cls(
            file=fields["file"].text(),
            sha256=fields["sha256"].sha256(),
            lines=fields["lines"].integer(1),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class QualityReport:
    """The task's score before and after, and the gate it passed.

    Attributes:
        before: `edgemoe evaluate --json` of the checkpoint, or None.
        after: the same of the exported task, or None.
        data: what was scored, or None.
        max_drop: largest loss allowed, or None where there was no gate.
        passed: whether the gate was passed, or None where there was no gate.
    """

    before: Mapping[str, Json] | None
    after: Mapping[str, Json] | None
    data: DataInfo | None
    max_drop: float | None
    passed: bool | None

    @classmethod
    def read(cls, value: Value) -> QualityReport:
        """Read from JSON."""
        fields = value.fields("before", "after", "data", "max_drop", "passed")
        return cls(
            before=fields["before"].optional(Value.free_form),
            after=fields["after"].optional(Value.free_form),
            data=fields["data"].optional(DataInfo.read),
            max_drop=fields["max_drop"].optional(Value.number),
            passed=fields["passed"].optional(Value.boolean),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "before": None if self.before is None else dict(self.before),
            "after": None if self.after is None else dict(self.after),
            "data": None if self.data is None else self.data.to_json(),
            "max_drop": self.max_drop,
            "passed": self.passed,
        }


@dataclass(frozen=True, kw_only=True)
class TaskEntry:
    """One task of a bundle.

    Attributes:
        graph: ONNX file of the task, "<task>.onnx".
        top_k: experts per token at most.
        experts_per_layer: experts that each MoE layer of this graph has.
        experts: per MoE layer, which experts of the checkpoint they are; None where all.
        plan: provenance of the plan that chose them, or None.
        parity: how far the graph is from eager, or None where not measured.
        quality: the score before and after, or None where not measured.
        k_table: for a graph whose tokens choose their number of experts, how many they use on
            average, by MoE layer and rounded up: what serves where the graph cannot choose.
        k_ladder: steps of the experts-per-token cap for this task, the first one is the full
            k; None where they were not measured.
    """

    graph: str
    top_k: int
    experts_per_layer: tuple[int, ...]
    experts: tuple[tuple[ExpertGroup, ...], ...] | None = None
    plan: Mapping[str, Json] | None = None
    parity: ParityReport | None = None
    quality: QualityReport | None = None
    k_table: tuple[int, ...] | None = None
    k_ladder: tuple[KRung, ...] | None = None

    @classmethod
    def read(cls, value: Value) -> TaskEntry:
        """Read from JSON."""
        fields = value.fields(
            "graph",
            "top_k",
            "experts_per_layer",
            "experts",
            "plan",
            "parity",
            "quality",
            *(name for name in ("k_table", "k_ladder") if name in value.mapping()),
        )
        table, ladder = fields.get("k_table"), fields.get("k_ladder")
        return cls(
            graph=fields["graph"].text(),
            top_k=fields["top_k"].integer(1),
            experts_per_layer=_integers(fields["experts_per_layer"], 1),
            experts=fields["experts"].optional(_experts),
            plan=fields["plan"].optional(Value.free_form),
            parity=fields["parity"].optional(ParityReport.read),
            quality=fields["quality"].optional(QualityReport.read),
            k_table=None if table is None else _integers(table, 1),
            k_ladder=None if ladder is None else tuple(map(KRung.read, ladder.items())),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        experts: Json = None
        if self.experts is not None:
            experts = [
                [list(group) if isinstance(group, tuple) else group for group in layer]
                for layer in self.experts
            ]
        ladder: list[Json] = [rung.to_json() for rung in self.k_ladder or ()]
        return {
            "graph": self.graph,
            "top_k": self.top_k,
            "experts_per_layer": list(self.experts_per_layer),
            "experts": experts,
            "plan": None if self.plan is None else dict(self.plan),
            "parity": None if self.parity is None else self.parity.to_json(),
            "quality": None if self.quality is None else self.quality.to_json(),
            **({} if self.k_table is None else {"k_table": list(self.k_table)}),
            **({} if self.k_ladder is None else {"k_ladder": ladder}),
        }


@dataclass(frozen=True, kw_only=True)
class SizeReport:
    """Bytes on disk: of all files listed, of shared weights, and of each task's own."""

    total_bytes: int
    shared_bytes: int
    task_bytes: Mapping[str, int]

    @classmethod
    def read(cls, value: Value) -> SizeReport:
        """Read from JSON."""
        fields = value.fields("total_bytes", "shared_bytes", "task_bytes")
        return cls(
            total_bytes=fields["total_bytes"].integer(0),
            shared_bytes=fields["shared_bytes"].integer(0),
            task_bytes={
                name: item.integer(0) for name, item in fields["task_bytes"].mapping().items()
            },
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "total_bytes": self.total_bytes,
            "shared_bytes": self.shared_bytes,
            "task_bytes": dict(self.task_bytes),
        }


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """Digest and size in bytes of one file."""

    sha256: str
    size: int

    @classmethod
    def read(cls, value: Value) -> FileEntry:
        """Read from JSON."""
        fields = value.fields("sha256", "size")
        return cls(sha256=fields["sha256"].sha256(), size=fields["size"].integer(0))

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return asdict(self)


def _integers(value: Value, minimum: int) -> tuple[int, ...]:
    return tuple(item.integer(minimum) for item in value.items())


def _experts(value: Value) -> tuple[tuple[ExpertGroup, ...], ...]:
    return tuple(
        tuple(
            _integers(group, 0) if isinstance(group.raw(), list) else group.integer(0)
            for group in layer.items()
        )
        for layer in value.items()
    )
