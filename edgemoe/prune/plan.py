"""Plans: which experts of each layer are kept, and which are merged into one.

A plan is a pure decision. It is JSON, small and made to be read, compared and edited by hand;
the same plan always has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgemoe.errors import PlanError
from edgemoe.lines import read_digests
from edgemoe.prune.plan_json import PlanReader
from edgemoe.staging import staged_file

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.contract import LayerShape, ModelShape

_FORMAT = "edgemoe.plan"
_VERSION = 1
_EDIT = "Correct the plan, or make it again with `edgemoe prune`."


@dataclass(frozen=True, kw_only=True)
class MergedExpert:
    """One expert of the compressed model.

    Attributes:
        members: Ids of the experts that it is made of, ascending; one id keeps that expert
            as it is.
        weights: Their shares, one each, in [0, inf) with a positive sum; only ratios count.
            None means equal shares.
        reference: The member that the others' neurons are aligned to; the one with the
            largest share where it is None.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    reference: int | None = None

    def __post_init__(self) -> None:
        if not self.members or any(member < 0 for member in self.members):
            raise PlanError(
                "members must be one or more expert ids in [0, inf), got "
                f"{list(self.members)}. {_EDIT}"
            )
        if len(set(self.members)) != len(self.members):
            raise PlanError(
                f"members must be different experts, got {list(self.members)}. {_EDIT}"
            )
        weights = self.weights
        if weights is not None:
            if len(weights) != len(self.members):
                raise PlanError(
                    "weights must have one value for each of the members "
                    f"{list(self.members)}, got {list(weights)}. {_EDIT}"
                )
            if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
                raise PlanError(
                    "weights must be finite, in [0, inf), with a positive sum, got "
                    f"{list(weights)}. {_EDIT}"
                )
            order = sorted(range(len(weights)), key=self.members.__getitem__)
            weights = tuple(float(weights[position]) for position in order)
        if self.reference is not None and self.reference not in self.members:
            raise PlanError(
                f"reference must be one of the members {list(self.members)}, got "
                f"{self.reference}. {_EDIT}"
            )
        object.__setattr__(self, "members", tuple(sorted(self.members)))
        # A single expert has no share to tell.
        object.__setattr__(self, "weights", weights if len(self.members) > 1 else None)
        object.__setattr__(self, "reference", self.reference if len(self.members) > 1 else None)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each member; they add up to 1."""
        weights = self.weights or (1.0,) * len(self.members)
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights)

    @property
    def aligned_to(self) -> int:
        """Id of the member that the others are aligned to."""
        if self.reference is not None:
            return self.reference
        shares = self.shares
        return self.members[shares.index(max(shares))]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The experts of one compressed layer.

    Attributes:
        layer: Index of the decoder layer.
        experts: Its experts, by rising id of their first member; every expert that is a
            member of none is dropped.
    """

    layer: int
    experts: tuple[MergedExpert, ...]

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for expert in self.experts:
            twice = seen.intersection(expert.members)
            if twice:
                raise PlanError(
                    f"layer {self.layer}: an expert must be used once, got expert {min(twice)} "
                    f"twice. {_EDIT}"
                )
            seen.update(expert.members)
        ordered = tuple(sorted(self.experts, key=lambda expert: expert.members))
        object.__setattr__(self, "experts", ordered)

    @property
    def is_merging(self) -> bool:
        """Whether any expert is made of several."""
        return any(len(expert.members) > 1 for expert in self.experts)

    def check(self, shape: LayerShape) -> None:
        """Check the decision against the layer that it is about.

        Args:
            shape: The layer.

        Raises:
            PlanError: It keeps too few experts, or experts that the layer lacks.
        """
        count = len(self.experts)
        if count < shape.top_k:
            raise PlanError(
                f"layer {self.layer} must keep at least top_k={shape.top_k} experts, got "
                f"{count}. Keep {shape.top_k} or more there (--keep-experts {shape.top_k}), or "
                "lower num_experts_per_tok of the checkpoint first."
            )
        if count < shape.min_experts:
            raise PlanError(
                f"layer {self.layer} must keep at least {shape.min_experts} experts, because "
                f"its router compares {shape.min_group_size} in each of {shape.n_group} "
                f"groups, got {count}. Keep {shape.min_experts} or more there."
            )
        last = max(expert.members[-1] for expert in self.experts)
        if last >= shape.num_experts:
            raise PlanError(
                f"layer {self.layer}: expert ids must be in [0, {shape.num_experts}), got "
                f"{last}. {_EDIT}"
            )
        self._check_groups(shape)

    def _check_groups(self, shape: LayerShape) -> None:
        """Equal, contiguous groups are how such a router reads its experts."""
        if shape.n_group == 1:
            return
        size = shape.num_experts // shape.n_group
        kept = [0] * shape.n_group
        for expert in self.experts:
            groups = {member // size for member in expert.members}
            if len(groups) > 1:
                raise PlanError(
                    f"layer {self.layer}: merged experts must be of one router group of "
                    f"{size}, got {list(expert.members)}. {_EDIT}"
                )
            kept[groups.pop()] += 1
        if len(set(kept)) > 1:
            raise PlanError(
                f"layer {self.layer}: each of the {shape.n_group} router groups must keep as "
                f"many experts, got {kept}. {_EDIT}"
            )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A decision for a whole model, and where it comes from.

    Attributes:
        method: Name of the method that decided.
        layers: One entry per MoE layer, by rising index.
        checkpoint_sha256: Fingerprint of the checkpoint that it is about; None, in a plan
            made by hand, leaves it open.
        statistics_sha256: Hash of the statistics that the method read.
        task: Task whose statistics were read.
        seed: Seed of the method.
        options: Options of the method; JSON values.
        edgemoe_version: Version of edgemoe that decided.
        calibration_lines: Digests of the lines that the statistics cover, as
            :func:`edgemoe.lines.write_digests` writes them: no score may be of these.
    """

    method: str
    layers: tuple[LayerPlan, ...]
    checkpoint_sha256: str | None = None
    statistics_sha256: str | None = None
    task: str | None = None
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    edgemoe_version: str | None = None
    calibration_lines: str | None = None

    def __post_init__(self) -> None:
        try:
            read_digests(self.calibration_lines or "")
        except ValueError as error:
            raise PlanError(f"calibration_lines: {error}. {_EDIT}") from error
        indices = [layer.layer for layer in self.layers]
        if len(set(indices)) != len(indices) or not indices:
            raise PlanError(f"layers must be one or more, each once, got {indices}. {_EDIT}")
        ordered = tuple(sorted(self.layers, key=lambda layer: layer.layer))
        object.__setattr__(self, "layers", ordered)

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Experts of each compressed layer."""
        return tuple(len(layer.experts) for layer in self.layers)

    @property
    def sha256(self) -> str:
        """Hash of the plan's bytes."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def validate(self, shape: ModelShape, checkpoint_sha256: str | None = None) -> None:
        """Check that the plan can be carried out.

        Args:
            shape: The model that it would be applied to.
            checkpoint_sha256: That model's fingerprint; None skips the comparison.

        Raises:
            PlanError: The plan is about another checkpoint or other layers, keeps fewer
                experts than top_k, or names experts that do not exist.
        """
        if None not in (self.checkpoint_sha256, checkpoint_sha256) and (
            self.checkpoint_sha256 != checkpoint_sha256
        ):
            raise PlanError(
                "the plan must have been made for this checkpoint, got checkpoint_sha256 "
                f"{self.checkpoint_sha256} for checkpoint {checkpoint_sha256}. Calibrate and "
                "prune this checkpoint, or set checkpoint_sha256 to null if you know that it "
                "fits."
            )
        planned = [layer.layer for layer in self.layers]
        present = [layer.layer for layer in shape.layers]
        if planned != present:
            missing = sorted(set(present) - set(planned))
            extra = sorted(set(planned) - set(present))
            raise PlanError(
                f"a plan must name each MoE layer once, got layers {missing} missing and "
                f"layers {extra} that have no experts. {_EDIT}"
            )
        for layer, layer_shape in zip(self.layers, shape.layers, strict=True):
            layer.check(layer_shape)

    def to_json(self) -> str:
        """Write the plan with one expert a line.

        Returns:
            JSON; equal plans give equal text.
        """
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "method": self.method,
            "options": dict(sorted(self.options.items())),
            "seed": self.seed,
            "task": self.task,
            "checkpoint_sha256": self.checkpoint_sha256,
            "statistics_sha256": self.statistics_sha256,
            "edgemoe_version": self.edgemoe_version,
        }
        if self.calibration_lines is not None:
            head["calibration_lines"] = self.calibration_lines
        lines = [f"  {json.dumps(key)}: {_dump(value)}," for key, value in head.items()]
        layers = ",\n".join(_layer_json(layer) for layer in self.layers)
        return "{\n" + "\n".join(lines) + '\n  "layers": [\n' + layers + "\n  ]\n}\n"

    @classmethod
    def from_json(cls, text: str, source: str = "plan") -> Plan:
        """Read a plan.

        Args:
            text: JSON.
            source: What messages call it.

        Returns:
            The plan.

        Raises:
            PlanError: The text is no JSON, or breaks the format; unknown keys are refused.
        """
        reader = PlanReader.parse(text, source)
        reader.expect("format", _FORMAT)
        reader.expect("version", _VERSION)
        layers = tuple(_read_layer(layer) for layer in reader.objects("layers"))
        plan = reader.build(
            cls,
            method=reader.string("method"),
            options=reader.mapping("options"),
            seed=reader.integer("seed"),
            task=reader.optional_string("task"),
            checkpoint_sha256=reader.optional_string("checkpoint_sha256"),
            statistics_sha256=reader.optional_string("statistics_sha256"),
            edgemoe_version=reader.optional_string("edgemoe_version"),
            calibration_lines=reader.optional_string("calibration_lines"),
            layers=layers,
        )
        reader.finish()
        return plan

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan file.

        Args:
            path: The file.

        Returns:
            The plan.

        Raises:
            PlanError: The file is missing, no UTF-8 JSON, or breaks the format.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise PlanError(
                f"a plan must be a file, got {path}, which does not exist. Make one with "
                "`edgemoe prune`."
            ) from error
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(
                f"{path} must be a UTF-8 JSON file, got: {error}. {_EDIT}"
            ) from error
        return cls.from_json(text, str(path))

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the plan, whole or not at all.

        Args:
            path: The file.
            force: Whether an existing file may be replaced.

        Raises:
            OutputError: The file exists and ``force`` is false, or it cannot be written.
        """
        with staged_file(path, force=force) as staged:
            staged.write_text(self.to_json(), encoding="utf-8")


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)


def _layer_json(layer: LayerPlan) -> str:
    experts = ",\n".join(f"      {_expert_json(expert)}" for expert in layer.experts)
    return f'    {{"layer": {layer.layer}, "experts": [\n{experts}\n    ]}}'


def _expert_json(expert: MergedExpert) -> str:
    content: dict[str, object] = {"members": list(expert.members)}
    if expert.weights is not None:
        content["weights"] = list(expert.weights)
    if expert.reference is not None:
        content["reference"] = expert.reference
    return json.dumps(content)


def _read_layer(reader: PlanReader) -> LayerPlan:
    experts = tuple(_read_expert(expert) for expert in reader.objects("experts"))
    layer = reader.build(LayerPlan, layer=reader.integer("layer"), experts=experts)
    reader.finish()
    return layer


def _read_expert(reader: PlanReader) -> MergedExpert:
    expert = reader.build(
        MergedExpert,
        members=reader.integers("members"),
        weights=reader.optional_numbers("weights"),
        reference=reader.optional_integer("reference"),
    )
    reader.finish()
    return expert
