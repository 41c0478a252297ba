"""Plans: which experts of each layer are kept or merged into one, and what their ranks are.

A plan is a pure decision. It is JSON, small and made to be read, compared and edited by hand;
the same plan always has the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgemoe.data_provenance import read_digests
from edgemoe.errors import CheckpointError, PlanError
from edgemoe.file_kinds import describe_mistake, identify
from edgemoe.k_policy import KPolicy
from edgemoe.plans.factors import Factors
from edgemoe.plans.layer_plan import (
    LayerPlan,
    MergedExpert,
    read_layer,
    stored_width,
    write_layer,
)
from edgemoe.plans.plan_json import PlanReader
from edgemoe.staging import staged_file
from edgemoe_runtime.input_files import read_file

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.shapes import ModelShape
    from edgemoe.plans.layer_plan import RankPair

__all__ = ["LayerPlan", "MergedExpert", "Plan"]

_FORMAT = "edgemoe.plan"
_VERSION = 1
_EDIT = "Correct the plan, or make it again with `edgemoe prune`."


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
            `edgemoe.data_provenance.write_digests` writes them: no score may be of these.
        factors: How the experts are written as products of thinner matrices, where layers have
            ranks.
        k_policy: How many of the experts that are left each token uses; None where that stays
            the router's top_k.
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
    factors: Factors | None = None
    k_policy: KPolicy | None = None

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
        ranked = [layer.layer for layer in ordered if layer.ranks is not None]
        narrowed = [layer.layer for layer in ordered if layer.prunes_width]
        if self.factors is not None and narrowed:
            raise PlanError(
                "a plan must either factor experts or choose their neurons, got ranks of "
                f"layers {ranked} and neurons of layers {narrowed}. Apply the one with neurons "
                "first, then calibrate and decompose what that writes."
            )
        if (self.factors is None) != (not ranked):
            raise PlanError(
                "a plan must have both factors and ranks, or none of them, got "
                f"{'no factors' if self.factors is None else 'factors'} and ranks of layers "
                f"{ranked}. {_EDIT}"
            )

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """Experts of each compressed layer."""
        return tuple(len(layer.experts) for layer in self.layers)

    @property
    def ranks_per_layer(self) -> tuple[RankPair | None, ...]:
        """Ranks that each layer's experts are stored with; None where they stay whole."""
        return tuple(layer.stored_ranks for layer in self.layers)

    @property
    def prunes_width(self) -> bool:
        """Whether any expert keeps only some of its intermediate channels."""
        return any(layer.prunes_width for layer in self.layers)

    def widths(self, shape: ModelShape) -> tuple[int, ...]:
        """Return the width that the experts of each layer are stored in.

        Args:
            shape: The model that the plan was validated for.

        Returns:
            Intermediate channels of every expert of the layer, padding included.
        """
        return tuple(
            stored_width(layer.experts, shape.width_of(layer.layer)) for layer in self.layers
        )

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
                experts than top_k, names experts or channels that do not exist, or has ranks
                that no matrix of that size can have.
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
            shares_bases = self.factors is not None and self.factors.shares_bases
            layer.check_widths(shape, shares_bases=shares_bases)
        self._check_k_policy()

    def _check_k_policy(self) -> None:
        """Check that tokens find as many experts as they are to use."""
        if self.k_policy is None:
            return
        planned = tuple(layer.layer for layer in self.layers)
        if self.k_policy.layers != planned:
            raise PlanError(
                f"a k policy must name the plan's layers {list(planned)}, got "
                f"{list(self.k_policy.layers)}. Make it again with `edgemoe allocate`."
            )
        for layer, rule in zip(self.layers, self.k_policy.rules, strict=True):
            if rule.slots > len(layer.experts):
                raise PlanError(
                    f"layer {layer.layer}: a token must use at most the {len(layer.experts)} "
                    f"experts that are kept, got k={rule.slots}. Make the k policy again with "
                    "`edgemoe allocate --plan`."
                )

    def to_json(self) -> str:
        """Write the plan with one expert a line.

        Returns:
            JSON; equal plans give equal text.
        """
        head: dict[str, Any] = {
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
        if self.factors is not None:
            head["factors"] = self.factors.to_json()
        if self.k_policy is not None:
            head["k_policy"] = self.k_policy.to_json()
        lines = [f"  {json.dumps(key)}: {_dump(value)}," for key, value in head.items()]
        layers = ",\n".join(write_layer(layer) for layer in self.layers)
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
        layers = tuple(read_layer(layer) for layer in reader.objects("layers"))
        factors = reader.optional_object("factors")
        k_policy = reader.optional_object("k_policy")
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
            factors=None if factors is None else Factors.from_json(factors),
            k_policy=None if k_policy is None else _read_k_policy(k_policy),
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
        kind = identify(path).name
        if kind not in ("plan", "missing", "json", "text"):
            raise PlanError(
                "a plan must be a file that `edgemoe prune`, `decompose` or `allocate` wrote, "
                f"got {describe_mistake(path)}."
            )
        try:
            text = read_file(path).decode("utf-8")
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

    @property
    def holds_texts(self) -> bool:
        """Whether it holds tokens of the calibration, for a method that runs layers."""
        return self.factors is not None and self.factors.sample is not None

    def save(self, path: Path, *, force: bool = False) -> None:
        """Write the plan, whole or not at all; for its owner alone where it holds text.

        Args:
            path: The file.
            force: Whether an existing file may be replaced.

        Raises:
            OutputError: The file exists and `force` is false, or it cannot be written.
        """
        with staged_file(path, force=force) as staged:
            staged.touch(mode=0o600 if self.holds_texts else 0o666)
            staged.write_text(self.to_json(), encoding="utf-8")


def _read_k_policy(reader: PlanReader) -> KPolicy:
    try:
        return KPolicy.from_json(reader.left, reader.place)
    except CheckpointError as error:
        raise PlanError(str(error)) from error


def _dump(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, allow_nan=False)
