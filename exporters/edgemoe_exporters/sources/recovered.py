"""Recovered checkpoints: made from the one that is exported, by a plan and a recovery.

What a checkpoint says of its origin is a chain, the latest step first: each step names the
checkpoint that it changed by its fingerprint, a plan which experts it kept. The chain must
reach the exported checkpoint, or the weights are of another model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.apply.provenance import list_kept
from edgemoe.errors import ExportError
from edgemoe.evaluate.contamination import lines_of
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.recover.registry import METHODS

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from edgemoe.plans.plan import Plan
    from edgemoe_exporters.bundle.expert_layout import ExpertKey
    from edgemoe_runtime.bundle.task_entry import ExpertGroup

_MOST_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class RecoveredCheckpoint:
    """A checkpoint whose weights a task gets.

    Attributes:
        checkpoint: It.
        recovered_by: Methods of recovery, the first first; empty where it was pruned only.
        plan_sha256: Hash of the plan that says which experts it has; None where none was cut.
        ids: The exported checkpoint's experts behind each of its own, by MoE layer.
        keys: What each expert is, for sharing with other tasks.
        lines: Digests of the lines that it was made from.
    """

    checkpoint: Checkpoint
    recovered_by: tuple[str, ...]
    plan_sha256: str | None
    ids: tuple[tuple[ExpertGroup, ...], ...]
    keys: tuple[tuple[ExpertKey, ...], ...]
    lines: frozenset[int]

    @classmethod
    def open(
        cls, task: str, path: Path, base: Checkpoint, plan: Plan | None = None
    ) -> RecoveredCheckpoint:
        """Open a checkpoint, and refuse one that was not made from the exported one.

        Args:
            task: Whose weights it has.
            path: Its directory.
            base: The exported checkpoint.
            plan: The plan that it was made from, where that is at hand.

        Returns:
            The checkpoint; its weights are not loaded.

        Raises:
            ExportError: It names another origin or plan, or not which experts it has.
            CheckpointError: It is missing, unsafe or inconsistent.
        """
        found = Checkpoint(path)
        provenance = found.structure.provenance
        steps = _steps_above(task, path, provenance, base)
        _check_same_model(task, found, base)
        plans = [step for step in steps if "calibration_lines" in step or "experts" in step]
        hashes = [step.get("plan_sha256") for step in plans]
        if plan is not None and hashes != [plan.sha256]:
            raise ExportError(
                f"the plan of {task} must be the one that {path} was made from, got plan "
                f"{plan.sha256[:12]} for {_short(hashes)}. Leave --plan {task} out."
            )
        counts = found.shape.experts_per_layer
        if plan is None:
            ids = _compose(task, path, plans, base.shape.experts_per_layer)
        else:
            ids = _as_ids(list_kept(plan))
        if tuple(map(len, ids)) != counts:
            raise ExportError(
                f"{path} must say which experts of {base.path} its {list(counts)} are, got "
                f"{list(map(len, ids))}. Give its plan too: --plan {task}=PLAN."
            )
        return cls(
            checkpoint=found,
            recovered_by=tuple(reversed(recoveries_in(steps))),
            plan_sha256=str(hashes[0]) if hashes else None,
            ids=ids,
            keys=_make_keys(ids, found, base, hashes),
            lines=lines_of(provenance),
        )


def recoveries_in(steps: list[Mapping[str, Any]]) -> list[str]:
    """Return the methods of recovery among the steps of a provenance, in their order."""
    return [
        str(step["method"])
        for step in steps
        if step.get("method") in METHODS and "training_lines" in step
    ]


def steps_of(provenance: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """List the steps by which a checkpoint was made, the latest first.

    Args:
        provenance: What it says; None where it says nothing.

    Returns:
        The steps.
    """
    steps: list[Mapping[str, Any]] = []
    step: Any = provenance
    while isinstance(step, dict) and len(steps) < _MOST_STEPS:
        steps.append(step)
        step = step.get("before")
    return steps


def _steps_above(
    task: str, path: Path, provenance: Mapping[str, Any] | None, base: Checkpoint
) -> list[Mapping[str, Any]]:
    """Return the steps that were made from the exported checkpoint on."""
    steps = steps_of(provenance)
    wanted = base.sha256
    named = [step.get("checkpoint_sha256") for step in steps]
    if wanted not in named:
        origin = "no other checkpoint" if not named else f"checkpoint {_short(named[-1:])}"
        raise ExportError(
            f"--from {task} must be made from {base.path} (checkpoint {wanted[:12]}) by "
            f"`edgemoe apply` and `edgemoe recover`, got {path}, which names {origin}. Give "
            "one of this model, or export it as MODEL."
        )
    return steps[: named.index(wanted) + 1]


def _check_same_model(task: str, found: Checkpoint, base: Checkpoint) -> None:
    """Refuse what no step of edgemoe changes: one interface serves all graphs of a bundle."""
    facts = [
        (one.family.model_type, int(one.config.vocab_size), one.tokenizer_sha256)
        for one in (found, base)
    ]
    for name, got, wanted in zip(("family", "vocabulary", "tokenizer"), *facts, strict=True):
        if got != wanted:
            raise ExportError(
                f"--from {task} must have the {name} of {base.path}, got {str(got)[:40]} for "
                f"{str(wanted)[:40]}. Recover a checkpoint that was made from it."
            )


def _compose(
    task: str, path: Path, plans: list[Mapping[str, Any]], counts: tuple[int, ...]
) -> tuple[tuple[ExpertGroup, ...], ...]:
    """Follow the experts through one plan after the other, the earliest last."""
    ids: tuple[tuple[ExpertGroup, ...], ...] = tuple(tuple(range(count)) for count in counts)
    for step in reversed(plans):
        if "experts" not in step:
            continue  # it kept all of them
        try:
            ids = tuple(
                tuple(_combine(before, group) for group in layer)
                for before, layer in zip(ids, _as_ids(step["experts"]), strict=True)
            )
        except (TypeError, IndexError, ValueError) as error:
            raise ExportError(
                f"{path} must say which experts it has, got a list that does not fit the "
                f"checkpoint before. Give its plan: --plan {task}=PLAN."
            ) from error
    return ids


def _combine(before: tuple[ExpertGroup, ...], group: ExpertGroup) -> ExpertGroup:
    if isinstance(group, int):
        return before[group]
    members: list[int] = []
    for one in group:
        old = before[one]
        members += [old] if isinstance(old, int) else list(old)
    return tuple(members)


def _as_ids(layers: Any) -> tuple[tuple[ExpertGroup, ...], ...]:
    return tuple(
        tuple(tuple(group) if isinstance(group, list) else int(group) for group in layer)
        for layer in layers
    )


def _make_keys(
    ids: tuple[tuple[ExpertGroup, ...], ...],
    found: Checkpoint,
    base: Checkpoint,
    hashes: list[Any],
) -> tuple[tuple[ExpertKey, ...], ...]:
    """Give whole experts the key that plans give them, and all others one of their plan's."""
    widths = zip(found.shape.widths_per_layer, base.shape.widths_per_layer, strict=True)
    return tuple(
        tuple(
            group if isinstance(group, int) and own == whole else ("made by", *hashes, group)
            for group in layer
        )
        for layer, (own, whole) in zip(ids, widths, strict=True)
    )


def _short(hashes: list[Any]) -> str:
    return ", ".join(str(one)[:12] for one in hashes) or "none"
