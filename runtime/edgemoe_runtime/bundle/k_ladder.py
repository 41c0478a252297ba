"""The k ladder: caps of experts per token, with the cost and the quality of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgemoe_runtime.json_fields import Json, Value


@dataclass(frozen=True, kw_only=True)
class RungQuality:
    """A rung's score on held-out lines, and its drop from the first rung's.

    Attributes:
        metric: `perplexity` or `accuracy`.
        value: the score.
        ci95: its 95% interval.
        drop: how much worse it is than on the first rung: relative for perplexity, in points
            of 1 for accuracy.
        drop_ci95: the 95% interval of that, over pairs of lines.
        lines: lines that were scored.
        margin: nats; every held-out line whose answer was ahead of the second best by more
            than this got the answer of the full k: of choices the choice, of texts three
            quarters of the most likely tokens, whose mean margin counts. None on the first
            rung.
        asked_again: share of the held-out lines with a smaller margin, which a session
            escalates to the full k.
    """

    metric: str
    value: float
    ci95: tuple[float, float]
    drop: float
    drop_ci95: tuple[float, float]
    lines: int
    margin: float | None = None
    asked_again: float = 0.0

    @classmethod
    def read(cls, value: Value) -> RungQuality:
        """Read from JSON."""
        fields = value.fields(
            "metric", "value", "ci95", "drop", "drop_ci95", "lines", "margin", "asked_again"
        )
        return cls(
            metric=fields["metric"].one_of("perplexity", "accuracy"),
            value=fields["value"].number(),
            ci95=_interval(fields["ci95"]),
            drop=fields["drop"].number(),
            drop_ci95=_interval(fields["drop_ci95"]),
            lines=fields["lines"].integer(1),
            margin=fields["margin"].optional(lambda item: item.number()),
            asked_again=fields["asked_again"].number(),
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {
            "metric": self.metric,
            "value": self.value,
            "ci95": list(self.ci95),
            "drop": self.drop,
            "drop_ci95": list(self.drop_ci95),
            "lines": self.lines,
            "margin": self.margin,
            "asked_again": self.asked_again,
        }


@dataclass(frozen=True)
class RungCost:
    """Time on a rung over the time on the first one, both measured in turn on one machine.

    Attributes:
        prefill: of a prompt.
        decode: of one new token.
    """

    prefill: float
    decode: float

    @classmethod
    def read(cls, value: Value) -> RungCost:
        """Read from JSON."""
        fields = value.fields("prefill", "decode")
        for item in fields.values():
            if not item.number() > 0:
                item.refuse("be above 0")
        return cls(prefill=fields["prefill"].number(), decode=fields["decode"].number())

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        return {"prefill": self.prefill, "decode": self.decode}


@dataclass(frozen=True, kw_only=True)
class KRung:
    """One step of a ladder.

    Attributes:
        name: unique in its ladder.
        k_cap: cap of experts per token, by MoE layer.
        quality: measured on held-out lines, or None where there were none.
        cost: measured time, or None where the bundle's target was not at hand.
    """

    name: str
    k_cap: tuple[int, ...]
    quality: RungQuality | None = None
    cost: RungCost | None = None

    @classmethod
    def read(cls, value: Value) -> KRung:
        """Read from JSON."""
        measured = [name for name in ("quality", "cost") if name in value.mapping()]
        fields = value.fields("name", "k_cap", *measured)
        return cls(
            name=fields["name"].text(),
            k_cap=fields["k_cap"].integers(1),
            quality=RungQuality.read(fields["quality"]) if "quality" in fields else None,
            cost=RungCost.read(fields["cost"]) if "cost" in fields else None,
        )

    def to_json(self) -> dict[str, Json]:
        """Return the JSON object."""
        document: dict[str, Json] = {"name": self.name, "k_cap": list(self.k_cap)}
        if self.quality is not None:
            document["quality"] = self.quality.to_json()
        if self.cost is not None:
            document["cost"] = self.cost.to_json()
        return document


def _interval(value: Value) -> tuple[float, float]:
    ends = value.items()
    if len(ends) != 2 or not ends[0].number() <= ends[1].number():
        value.refuse("be two numbers, the lower one first")
    return ends[0].number(), ends[1].number()
