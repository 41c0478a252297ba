"""Write a sweep's report: report.json, sweep.csv, times.csv, report.md, sweep.png, plans/."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgemoe.evaluate.gate import find_weaknesses
from edgemoe.prune.registry import fill_options, find_method
from edgemoe.recover.registry import find_method as find_recovery
from edgemoe.sweep.methods import method_of
from edgemoe.sweep.outcome import PLANS
from edgemoe.sweep.plot import write_plot
from edgemoe.sweep.report_text import UNPRUNED, list_columns, tell_threshold
from edgemoe.sweep.sweep_dir import CALIBRATION, HELD_OUT, STATISTICS
from edgemoe.versions import __version__, library_versions

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edgemoe.sweep.outcome import Outcome, Row
    from edgemoe.sweep.threshold import Point

FORMAT = "edgemoe.sweep"
VERSION = 1
# Files are named from the report's directory on, which may be moved.
_HERE = Path()


def write_report(outcome: Outcome, folder: Path, work: Path) -> None:
    """Write all files of a report.

    All but `times.csv` are the same, byte for byte, whenever the same sweep is run.

    Args:
        outcome: What was found.
        folder: An empty directory.
        work: Where the statistics and the held-out lines are.
    """
    rows = [_describe_row(row) for row in outcome.rows]
    _write_csv(folder / "sweep.csv", [_flatten(row) for row in rows])
    _write_csv(folder / "times.csv", _list_times(outcome))
    text = json.dumps(describe(outcome), indent=1, ensure_ascii=False)
    (folder / "report.json").write_text(f"{text}\n", encoding="utf-8")
    (folder / "report.md").write_text(_write_markdown(outcome), encoding="utf-8")
    write_plot(outcome, folder / "sweep.png")
    (folder / PLANS).mkdir()
    for finding in outcome.findings:
        # A cut and its recoveries have one plan.
        finding.plan.save(folder / finding.plan_file, force=True)
    for kind in (HELD_OUT, *([CALIBRATION] if outcome.request.recoveries else [])):
        (folder / kind).mkdir()
        for name in outcome.lines:
            file = f"{kind}/{name}.jsonl"
            # With its mode: it is for its owner alone.
            shutil.copy(work / file, folder / file)
    shutil.copy(work / STATISTICS, folder / STATISTICS)


def describe(outcome: Outcome) -> dict[str, Any]:
    """Return all that was found.

    Args:
        outcome: What was found.

    Returns:
        JSON values, the content of `report.json`.
    """
    request, statistics = outcome.request, outcome.statistics
    return {
        "format": FORMAT,
        "version": VERSION,
        "created_by": f"edgemoe {__version__}",
        "versions": library_versions(),
        "model": str(request.model),
        "checkpoint_sha256": statistics.checkpoint_sha256,
        "statistics_sha256": statistics.sha256,
        "family": statistics.shape.family,
        "experts_per_layer": list(statistics.shape.experts_per_layer),
        "max_drop": request.max_drop,
        "accept_weak_evidence": request.accept_weak_evidence,
        "calibration_tokens": request.calibration_tokens,
        "held_out_tokens": request.held_out_tokens,
        "seeds": list(request.seeds),
        "methods": {
            name: {
                "draws": find_method(method_of(name)).stochastic,
                "options": fill_options(method_of(name), given),
            }
            for name, given in request.methods.items()
        },
        "recoveries": {
            name: find_recovery(name).settle(options, has_teacher=True).to_dict()
            for name, options in request.recoveries.items()
        },
        "tasks": {
            name: {
                "file": str(task.calibration.path),
                "sha256": task.calibration.sha256,
                "kind": task.calibration.kind,
                "calibration_lines": len(task.calibration.records),
                "calibration_tokens": statistics.task(name).tokens,
                "held_out_file": str(task.held_out.path),
                "held_out_sha256": outcome.held_out[name].sha256,
                "held_out_lines": len(task.held_out.records),
                "held_out_lines_left_out": task.left_out,
                "judged_lines": outcome.unpruned.scores[name].n,
                "judged_tokens": outcome.unpruned.scores[name].tokens,
                "chance": outcome.chance(name),
                "weak_evidence": list(
                    find_weaknesses(outcome.unpruned.scores[name], outcome.vocabulary)
                ),
                "details": outcome.unpruned.scores[name].details,
            }
            for name, task in outcome.lines.items()
        },
        "thresholds": {
            name: {
                "best": _describe_point(outcome, name, threshold.best),
                "by_method": {
                    method: _describe_point(outcome, name, point)
                    for method, point in threshold.by_method.items()
                },
                "sentence": tell_threshold(outcome, threshold, _HERE),
            }
            for name, threshold in outcome.thresholds.items()
        },
        "impossible": [vars(found) for found in outcome.impossible],
        "notes": list(outcome.notes),
        "rows": [_describe_row(row) for row in outcome.rows],
    }


def _describe_point(outcome: Outcome, task: str, point: Point | None) -> dict[str, Any] | None:
    if point is None:
        return None
    row = outcome.row_at(task, point)
    other = outcome.worst_other(row)
    return {
        "method": row.method,
        "recovery": row.recovery,
        "keep": row.keep,
        "kept_fraction": point.kept_fraction,
        "drop": point.drop,
        "drop_upper": point.upper,
        "plan": row.plan,
        "plan_sha256": row.plan_sha256,
        "worst_other": None
        if other is None
        else {
            "task": other.judged_on,
            "metric": other.score.metric,
            "drop": other.drop.value,
            "drop_ci95": list(other.drop.ci95),
        },
    }


def _describe_row(row: Row) -> dict[str, Any]:
    return {
        "task": row.task,
        "method": row.method or UNPRUNED,
        "keep": row.keep,
        "seed": row.seed,
        "recovery": row.recovery,
        "judged_on": row.judged_on,
        "experts": row.experts,
        "experts_before": row.experts_before,
        "kept_fraction": row.kept_fraction,
        "checkpoint_bytes": row.checkpoint_bytes,
        "metric": row.score.metric,
        "score": row.score.value,
        "ci95": list(row.score.ci95),
        "drop": row.drop.value,
        "drop_ci95": list(row.drop.ci95),
        "lines": row.score.n,
        "tokens": row.score.tokens,
        "plan": row.plan,
        "plan_sha256": row.plan_sha256,
    }


def _flatten(row: dict[str, Any]) -> dict[str, Any]:
    """Write each end of an interval into a column of its own."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, list):
            flat[f"{name}_low"], flat[f"{name}_high"] = value
        else:
            flat[name] = value
    return flat


def _list_times(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "task": finding.candidate.task,
            "method": finding.candidate.method,
            "keep": finding.candidate.keep,
            "seed": finding.candidate.seed,
            "recovery": finding.recovery,
            "plan_seconds": round(finding.plan_seconds, 3),
            "recover_seconds": round(finding.judgement.recover_seconds, 3),
            "judge_seconds": round(finding.judgement.seconds, 3),
        }
        for finding in outcome.findings
    ]


def _write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(rows[0])
        writer.writerows(
            ["" if cell is None else cell for cell in row.values()] for row in rows
        )


def _write_markdown(outcome: Outcome) -> str:
    heading, lines = list_columns(outcome)
    statistics = outcome.statistics
    counted = ", ".join(
        f"{name} {statistics.task(name).tokens} to choose and {score.tokens} in {score.n} "
        "lines to judge"
        for name, score in outcome.unpruned.scores.items()
    )
    parts = [
        "# Sweep",
        "",
        *(
            f"- {tell_threshold(outcome, found, _HERE)}"
            for found in outcome.thresholds.values()
        ),
        *(f"- Note: {note}" for note in outcome.notes),
        "",
        _markdown_row(heading),
        _markdown_row(["---"] * len(heading)),
        *map(_markdown_row, lines),
        "",
        f"{statistics.shape.family}, checkpoint {statistics.checkpoint_sha256[:12]}. Tokens: "
        f"{counted}. A drop is the relative rise of perplexity, or the fall of accuracy in "
        "points; intervals are 95%, by a bootstrap over lines, for drops over pairs.",
        "",
        "![drop against kept fraction](sweep.png)",
        "",
    ]
    return "\n".join(parts)


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
