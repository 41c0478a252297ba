"""What a sweep's report says: what was swept, what holds, and what it was made from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.errors import SweepError
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

REPORT_FILE = "report.json"
REPORT_FORMAT = "edgemoe.sweep"
_VERSION = 1


def describe_report(folder: Path) -> dict[str, Any]:
    """Tell what a report holds.

    Args:
        folder: The directory that `edgemoe sweep` wrote.

    Returns:
        JSON values; `kind` comes first.

    Raises:
        SweepError: `report.json` is not as a sweep writes it.
    """
    file = folder / REPORT_FILE
    try:
        found = parse_strict(read_file(file))
        known = (found["format"], found["version"]) == (REPORT_FORMAT, _VERSION)
        if known:
            return _summarise(folder, found)
    except OSError as error:
        raise SweepError(f"a report must be readable, got {error}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise SweepError(
            f"{file} must be as `edgemoe sweep` wrote it, got one where "
            f"{type(error).__name__}: {error}. Sweep again."
        ) from error
    raise SweepError(
        f"{file} must be a report of version {_VERSION}, got {found['format']} "
        f"{found['version']}. Use the edgemoe that wrote it."
    )


def _summarise(folder: Path, found: Mapping[str, Any]) -> dict[str, Any]:
    rows = found["rows"]
    whole, *_ = (row for row in rows if row["plan"] is None)
    plans = {row["plan"]: row for row in rows if row["plan"] is not None}
    return {
        "kind": "sweep report",
        "path": str(folder),
        "created_by": found["created_by"],
        "holds_texts": (folder / "held-out").is_dir(),
        "model": found["model"],
        "family": found["family"],
        "experts_per_layer": found["experts_per_layer"],
        "checkpoint_sha256": found["checkpoint_sha256"],
        "statistics_sha256": found["statistics_sha256"],
        "versions": found["versions"],
        "methods": {name: dict(method["options"]) for name, method in found["methods"].items()},
        "recoveries": found["recoveries"],
        "keep": sorted({row["keep"] for row in plans.values()}, reverse=True),
        "seeds": found["seeds"],
        "left_out": {str(one["keep"]): one["reason"] for one in found["impossible"]},
        "plans": len(plans),
        "missing_plans": [plan for plan in plans if not (folder / plan).is_file()],
        "checkpoint_bytes": {
            "unpruned": whole["checkpoint_bytes"],
            "deepest_cut": min(row["checkpoint_bytes"] for row in plans.values()),
        },
        "tasks": {
            name: {
                "kind": task["kind"],
                "file": task["file"],
                "sha256": task["sha256"],
                "calibration_tokens": task["calibration_tokens"],
                "held_out_sha256": task["held_out_sha256"],
                "judged_lines": task["judged_lines"],
                "judged_tokens": task["judged_tokens"],
            }
            for name, task in found["tasks"].items()
        },
        "max_drop": found["max_drop"],
        "thresholds": {
            name: _describe_threshold(threshold, plans)
            for name, threshold in found["thresholds"].items()
        },
        "notes": found["notes"],
    }


def _describe_threshold(
    threshold: Mapping[str, Any], plans: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    best = threshold["best"]
    keeps = {
        name: None if point is None else point["keep"]
        for name, point in threshold["by_method"].items()
    }
    if best is None:
        return {"verdict": threshold["sentence"], "keep_by_method": keeps}
    row = plans[best["plan"]]
    return {
        "verdict": threshold["sentence"],
        "method": best["method"],
        "recovery": best["recovery"],
        "keep": best["keep"],
        "experts": row["experts"],
        "kept_fraction": best["kept_fraction"],
        "checkpoint_bytes": row["checkpoint_bytes"],
        "drop": best["drop"],
        "drop_upper": best["drop_upper"],
        "plan": best["plan"],
        "plan_sha256": best["plan_sha256"],
        "keep_by_method": keeps,
    }
