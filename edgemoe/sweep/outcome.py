"""What a sweep found: a row per cut and judged task, and the threshold of each task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from edgemoe.evaluate.drop import Drop, paired_drop
from edgemoe.evaluate.gate import MINIMUM_LINES, chance_level, find_weaknesses
from edgemoe.prune.registry import find_method
from edgemoe.sweep.methods import method_of
from edgemoe.sweep.threshold import Point, choose_deepest, find_nearest, find_threshold

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.evaluate.evaluation import Evaluation
    from edgemoe.plans.plan import Plan
    from edgemoe.sweep.candidates import Candidate, Impossible
    from edgemoe.sweep.evaluation import CandidateEvaluation
    from edgemoe.sweep.request import SweepRequest
    from edgemoe.sweep.task_examples import TaskLines
    from edgemoe.tasks import TaskFile

PLANS = "plans"


def name_series(method: str, recovery: str | None) -> str:
    """Name a method and how its cuts were recovered, as tables do."""
    return method if recovery is None else f"{method}, then {recovery}"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One cut, and how it was judged.

    Attributes:
        candidate: The cut.
        plan: Its plan.
        plan_seconds: What the plan took to make.
        judgement: Its scores; those of another cut that decided the same.
        recovery: The method of recovery before it was judged; None where there was none.
    """

    candidate: Candidate
    plan: Plan
    plan_seconds: float
    judgement: CandidateEvaluation
    recovery: str | None = None

    @property
    def plan_file(self) -> str:
        """Where the plan is in the report's directory."""
        return f"{PLANS}/{self.candidate.name}.json"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One cut, judged on one task.

    Attributes:
        task: The task that chose the experts; None for the unpruned model.
        method: The method; None for the unpruned model.
        keep: Fraction of each layer's experts that was asked for.
        seed: Seed of the method.
        recovery: The method of recovery before it was judged; None where there was none.
        judged_on: The task that judges.
        experts: Routed experts that are left.
        experts_before: Routed experts of the unpruned model.
        kept_fraction: Fraction of the routed experts' parameters that is left.
        checkpoint_bytes: Size of the compressed checkpoint's tensors.
        score: Score on the held-out lines.
        drop: How much worse it is than that of the unpruned model on the same lines.
        plan_sha256: Hash of the plan; None for the unpruned model.
        plan: The plan's file in the report's directory; None for the unpruned model.
    """

    task: str | None
    method: str | None
    keep: float
    seed: int
    recovery: str | None
    judged_on: str
    experts: int
    experts_before: int
    kept_fraction: float
    checkpoint_bytes: int
    score: Evaluation
    drop: Drop
    plan_sha256: str | None
    plan: str | None

    @property
    def is_own(self) -> bool:
        """Whether the task that chose the experts judges them."""
        return self.task == self.judged_on

    @property
    def series(self) -> str | None:
        """The method, and how its cuts were recovered; None for the unpruned model."""
        return None if self.method is None else name_series(self.method, self.recovery)

    @property
    def prunes_width(self) -> bool:
        """Whether the method keeps all experts and chooses their intermediate channels."""
        return self.method is not None and find_method(method_of(self.method)).prunes_width


@dataclass(frozen=True, kw_only=True)
class Threshold:
    """The deepest cut of one task that holds.

    Attributes:
        task: The task.
        by_method: Of each method, and of each recovered; None where no cut of it holds.
        best: The deepest of them; None where no cut holds.
        nearest: The cut that is nearest to holding; None where nothing was cut.
    """

    task: str
    by_method: Mapping[str, Point | None]
    best: Point | None
    nearest: Point | None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Results of a sweep.

    Attributes:
        request: What was asked for.
        statistics: What the methods read.
        lines: The tasks' lines.
        held_out: The lines that judged, by task, as files.
        findings: The cuts, in their order.
        unpruned: The unpruned model.
        impossible: Fractions that the model cannot keep.
        whole: Whether the model was loaded whole.
        vocabulary: Tokens that the model chooses from.
    """

    request: SweepRequest
    statistics: Statistics
    lines: Mapping[str, TaskLines]
    held_out: Mapping[str, TaskFile]
    findings: Sequence[Finding]
    unpruned: CandidateEvaluation
    impossible: Sequence[Impossible]
    whole: bool
    vocabulary: int

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The unpruned model, then every cut, each on every task."""
        before = self.unpruned.sizes
        rows = [
            Row(
                task=None,
                method=None,
                keep=1.0,
                seed=0,
                recovery=None,
                judged_on=name,
                experts=before.experts,
                experts_before=before.experts,
                kept_fraction=1.0,
                checkpoint_bytes=before.checkpoint_bytes,
                score=score,
                drop=Drop(0.0, (0.0, 0.0)),
                plan_sha256=None,
                plan=None,
            )
            for name, score in self.unpruned.scores.items()
        ]
        for finding in self.findings:
            candidate, after = finding.candidate, finding.judgement.sizes
            rows += [
                Row(
                    task=candidate.task,
                    method=candidate.method,
                    keep=candidate.keep,
                    seed=candidate.seed,
                    recovery=finding.recovery,
                    judged_on=name,
                    experts=after.experts,
                    experts_before=before.experts,
                    kept_fraction=after.routed_parameters / before.routed_parameters,
                    checkpoint_bytes=after.checkpoint_bytes,
                    score=score,
                    drop=self._drop(finding, name),
                    plan_sha256=finding.plan.sha256,
                    plan=finding.plan_file,
                )
                for name, score in finding.judgement.scores.items()
            ]
        return tuple(rows)

    @cached_property
    def own_rows(self) -> tuple[Row, ...]:
        """Every cut on the task that chose it."""
        return tuple(row for row in self.rows if row.is_own)

    @property
    def series(self) -> tuple[str, ...]:
        """Every method by itself, and with every recovery."""
        ways = (None, *self.request.recoveries)
        return tuple(
            name_series(method, way) for method in self.request.methods for way in ways
        )

    @cached_property
    def thresholds(self) -> dict[str, Threshold]:
        """The threshold of each task."""
        found = {}
        for task in self.request.tasks:
            points = {series: self._points(task, series) for series in self.series}
            by_method = {
                series: find_threshold(of_series, self.request.max_drop)
                for series, of_series in points.items()
            }
            found[task] = Threshold(
                task=task,
                by_method=by_method,
                best=choose_deepest(by_method.values()),
                nearest=find_nearest(point for group in points.values() for point in group),
            )
        return found

    def chance(self, task: str) -> float:
        """Return the score of who knows nothing of a task.

        Args:
            task: The task.

        Returns:
            As `edgemoe.evaluate.gate.chance_level`.
        """
        return chance_level(self.unpruned.scores[task], self.vocabulary)

    def row_at(self, task: str, point: Point) -> Row:
        """Return a point's row, of its first seed.

        Args:
            task: The task.
            point: One of its points.

        Returns:
            The row, on the task itself.
        """
        return self._seeds(task, point.series, point.keep)[0]

    def worst_other(self, row: Row) -> Row | None:
        """Return the row of the other task that a cut costs most.

        Args:
            row: A cut on its own task.

        Returns:
            The cut on that task; None where there is no other.
        """
        others = [
            other
            for other in self.rows
            if other.plan is not None
            and (other.plan, other.recovery) == (row.plan, row.recovery)
            and not other.is_own
        ]
        return max(others, key=lambda other: other.drop.value, default=None)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on the scores for their reader, a sentence each."""
        notes = [
            f"--keep {found.keep:g} was left out: {found.reason}" for found in self.impossible
        ]
        for name, score in self.unpruned.scores.items():
            if score.n < MINIMUM_LINES:
                more = len(self.lines[name].held_out.records) - score.n
                remedy = (
                    f"{more} more are held out: raise --held-out-tokens"
                    if more
                    else "add lines"
                )
                notes.append(
                    f"{name} is judged by {score.n} lines: with fewer than {MINIMUM_LINES}, "
                    f"95% intervals are rough; {remedy}."
                )
            weak = find_weaknesses(score, self.vocabulary)
            if weak:
                notes.append(f"the threshold of {name} rests on weak evidence: {weak[-1]}.")
            left_out = self.lines[name].left_out
            if left_out:
                notes.append(
                    f"{left_out} held-out lines of {name} judge nothing, because a calibration "
                    "reads the same text."
                )
        if not self.whole:
            notes.append(
                "the checkpoint is larger than memory: it was read and run one decoder layer "
                "at a time."
            )
        return tuple(notes)

    def _drop(self, finding: Finding, task: str) -> Drop:
        if finding.judgement is self.unpruned:
            # Nothing was cut, so nothing is uncertain.
            return Drop(0.0, (0.0, 0.0))
        return paired_drop(self.unpruned.scores[task], finding.judgement.scores[task])

    def _points(self, task: str, series: str) -> list[Point]:
        points = []
        for keep in dict.fromkeys(row.keep for row in self.own_rows):
            rows = self._seeds(task, series, keep)
            points.append(
                Point(
                    series=series,
                    keep=keep,
                    kept_fraction=max(row.kept_fraction for row in rows),
                    drop=sum(row.drop.value for row in rows) / len(rows),
                    upper=max(row.drop.ci95[1] for row in rows),
                    is_cut=any(row.kept_fraction < 1 for row in rows),
                )
            )
        return points

    def _seeds(self, task: str, series: str, keep: float) -> list[Row]:
        return [
            row
            for row in self.own_rows
            if (row.task, row.series, row.keep) == (task, series, keep)
        ]
