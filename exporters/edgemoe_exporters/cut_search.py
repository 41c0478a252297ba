"""Find the deepest cut that the quality gate lets pass: `--keep auto`.

Cuts are ordered by what they keep, and the search halves what is left: it takes for granted
that a cut deeper than one that fails would fail too. Each cut that is tried is judged by its
written graph, quantisation included, as the bundle is in the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import PlanError, QualityGateError
from edgemoe.prune.registry import count_for, find_method
from edgemoe_exporters.bundle.task_experts import sizes_after_pruning

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from edgemoe.evaluate.gate import JudgedDrop
    from edgemoe.models.shapes import ModelShape

_WIDTH_STEPS = 16


@dataclass(frozen=True)
class Cut:
    """A cut that may be tried.

    Attributes:
        keep: The fraction that `--keep` would say.
        counts: Experts to keep per MoE layer, or intermediate channels of each expert.
    """

    keep: float
    counts: tuple[int, ...]


def list_cuts(method: str, shape: ModelShape) -> list[Cut]:
    """List the cuts of a model.

    Args:
        method: The pruning method.
        shape: The model.

    Returns:
        One expert fewer after the other, or a sixteenth of the channels, the shallowest first;
        none that keeps all, or fewer than a router can choose from.

    Raises:
        PlanError: The model cannot be cut.
    """
    whole = sizes_after_pruning(method, shape, ())
    steps = _WIDTH_STEPS if find_method(method).prunes_width else max(shape.experts_per_layer)
    cuts: dict[tuple[int, ...], Cut] = {}
    for step in range(steps - 1, 0, -1):
        keep = step / steps
        try:
            counts = count_for(method, shape, keep)
        except PlanError:
            continue  # groups of experts must stay equal, and large enough
        if sizes_after_pruning(method, shape, counts) != whole:
            # Of fractions that are rounded to the same numbers the last that is not below them.
            exact = cuts.get(counts)
            if exact is None or keep * sum(shape.experts_per_layer) >= sum(counts):
                cuts[counts] = Cut(keep, counts)
    if not cuts:
        raise PlanError(
            "--keep auto must have a cut to try, got a model of which no expert can go: its "
            "tokens use them all. Give --keep 1, or export another model."
        )
    return list(cuts.values())


def find_deepest(
    task: str, cuts: Sequence[Cut], judge: Callable[[Cut], JudgedDrop], max_drop: float
) -> Cut:
    """Find the deepest cut whose drop is within a limit.

    Args:
        task: The task, for the message.
        cuts: The shallowest first, at least one.
        judge: Judges a cut; called once for each that is tried.
        max_drop: The limit, as `edgemoe.evaluate.gate` takes it.

    Returns:
        The cut: it holds, and the next deeper one does not, or there is none.

    Raises:
        QualityGateError: Not even the shallowest holds; the message has what was seen.
    """
    holds, fails = -1, len(cuts)
    seen: list[str] = []
    while fails - holds > 1:
        middle = (holds + fails) // 2
        judged = judge(cuts[middle])
        seen.append(f"--keep {cuts[middle].keep:g}: {judged}")
        if judged.holds(max_drop):
            holds = middle
        else:
            fails = middle
    if holds < 0:
        raise QualityGateError(
            f"--keep auto must find a cut of task {task} within --max-drop {max_drop:g}, got "
            f"none: {'; '.join(reversed(seen))}. No bundle was written. Recover the cuts "
            "(--recover least-squares), choose a higher --precision, allow a larger "
            "--max-drop, or keep all experts with --keep 1."
        )
    return cuts[holds]
