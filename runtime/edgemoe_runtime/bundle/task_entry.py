"""One task of a manifest: its graph, its experts, and how it was checked and scored."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.k_ladder import KRung
from edgemoe_runtime.json_fields import Json, Value

if TYPE_CHECKING:
    from collections.abc import Mapping

ExpertGroup = int | tuple[int, ...]
"""One expert of a task: an id of the checkpoint, or the ids that were merged into it."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """Difference of the exported graph from its reference.

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
        drop: how much worse the score is, its 95% interval, the lines and the chance level, or
            None.
        same_token_share: share of positions, in [0, 1], with the best token of the checkpoint,
            or None.
        kl_nats: mean divergence from the checkpoint's next-token distributions, or None.
        positions: how many of them were compared, or None.
        speed: times beside an unpruned graph and the checkpoint, where the bundle was made, or
            None.
    """

    before: Mapping[str, Json] | None
    after: Mapping[str, Json] | None
    data: DataInfo | None
    max_drop: float | None
    passed: bool | None
    drop: Mapping[str, Json] | None = None
    same_token_share: float | None = None
    kl_nats: float | None = None
    positions: int | None = None
    speed: Mapping[str, Json] | None = None

    @classmethod
    def read(cls, value: Value) -> QualityReport:
        """Read from JSON."""
        known = ("drop", "same_token_share", "kl_nats", "positions", "speed")
        given = [name for name in known if name in value.mapping()]
        fields = value.fields("before", "after", "data", "max_drop", "passed", *given)
        drop, share, kl = (fields.get(name) for name in known[:3])
        positions, speed = fields.get("positions"), fields.get("speed")
        return cls(
            before=fields["before"].optional(Value.free_form),
            after=fields["after"].optional(Value.free_form),
            data=fields["data"].optional(DataInfo.read),
            max_drop=fields["max_drop"].optional(Value.number),
            passed=fields["passed"].optional(Value.boolean),
            drop=None if drop is None else drop.free_form(),
            same_token_share=None if share is None else share.number(),
            kl_nats=None if kl is None else kl.number(),
            positions=None if positions is None else positions.integer(1),
            speed=None if speed is None else speed.free_form(),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        measured: dict[str, Json] = {
            "drop": None if self.drop is None else dict(self.drop),
            "same_token_share": self.same_token_share,
            "kl_nats": self.kl_nats,
            "positions": self.positions,
            "speed": None if self.speed is None else dict(self.speed),
        }
        return {
            "before": None if self.before is None else dict(self.before),
            "after": None if self.after is None else dict(self.after),
            "data": None if self.data is None else self.data.to_json(),
            "max_drop": self.max_drop,
            "passed": self.passed,
            **{name: value for name, value in measured.items() if value is not None},
        }


@dataclass(frozen=True, kw_only=True)
class WeightsInfo:
    """Whose weights a task has.

    Attributes:
        checkpoint: name of the checkpoint that has them, pruned in this bundle or before.
        checkpoint_sha256: its fingerprint.
        recovered_by: methods that recovered them, the first one first; none where nothing did.
    """

    checkpoint: str
    checkpoint_sha256: str
    recovered_by: tuple[str, ...]

    @classmethod
    def read(cls, value: Value) -> WeightsInfo:
        """Read from JSON."""
        fields = value.fields("checkpoint", "checkpoint_sha256", "recovered_by", "described")
        return cls(
            checkpoint=fields["checkpoint"].text(),
            checkpoint_sha256=fields["checkpoint_sha256"].sha256(),
            recovered_by=tuple(name.text() for name in fields["recovered_by"].items()),
        )

    @property
    def described(self) -> str:
        """The same in a few words."""
        if not self.recovered_by:
            return f"{self.checkpoint}'s own, not recovered"
        return f"{self.checkpoint}'s, recovered by {', then '.join(self.recovered_by)}"

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "checkpoint": self.checkpoint,
            "checkpoint_sha256": self.checkpoint_sha256,
            "recovered_by": list(self.recovered_by),
            "described": self.described,
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
        parity: difference of the graph from eager, or None where not measured.
        quality: the score before and after, or None where not measured.
        k_table: for a graph whose tokens choose their number of experts, the mean that they
            use, by MoE layer and rounded up: the fallback where the graph cannot choose.
        k_ladder: steps of the experts-per-token cap for this task, the first one is the full
            k; None where they were not measured.
        weights: whose weights it has, and what recovered them; None in older bundles.
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
    weights: WeightsInfo | None = None

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
            *(name for name in ("k_table", "k_ladder", "weights") if name in value.mapping()),
        )
        table, ladder = fields.get("k_table"), fields.get("k_ladder")
        weights = fields.get("weights")
        return cls(
            graph=fields["graph"].text(),
            top_k=fields["top_k"].integer(1),
            experts_per_layer=fields["experts_per_layer"].integers(1),
            experts=fields["experts"].optional(_experts),
            plan=fields["plan"].optional(Value.free_form),
            parity=fields["parity"].optional(ParityReport.read),
            quality=fields["quality"].optional(QualityReport.read),
            k_table=None if table is None else table.integers(1),
            k_ladder=None if ladder is None else tuple(map(KRung.read, ladder.items())),
            weights=None if weights is None else WeightsInfo.read(weights),
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
            **({} if self.weights is None else {"weights": self.weights.to_json()}),
        }


def _experts(value: Value) -> tuple[tuple[ExpertGroup, ...], ...]:
    return tuple(
        tuple(
            group.integers(0) if isinstance(group.raw(), list) else group.integer(0)
            for group in layer.items()
        )
        for layer in value.items()
    )
