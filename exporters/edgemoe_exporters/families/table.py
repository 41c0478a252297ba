"""The support table as a page of documentation."""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import platform
from typing import TYPE_CHECKING

from edgemoe.models.registry import PUBLISHED_IN
from edgemoe_exporters.families.check import STEPS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe_exporters.families.check import FamilyReport

_PACKAGES = ("transformers", "torch", "onnxruntime", "tensorrt-rtx")


_TITLE = (
    "# Model families",
    "",
    "Made by",
    "",
    "    edgemoe families --check --markdown docs/families.md",
    "",
    "which tries what is installed; name families to try only those. A family that is not in",
    "the table works where its layers are built of the same parts, and is refused by name",
    "otherwise.",
    "",
)


_PUBLISHED = (
    "- **published in**: the model_type of checkpoints that hold it beside parts that see or "
    "hear; the language model is read from those, with the logits of the whole "
    "(`tests/edgemoe/models/test_published.py`)"
)

_VERBS = {
    "uniform": "calibrated, pruned and opened by plain transformers",
    "ragged": "with different numbers of experts in each layer",
    "factored": "with factored experts",
    "ort": "exported for onnxruntime",
    "streamed": "layer by layer",
    "tensorrt": "for TensorRT",
    "engine": "built as engines",
}


def render_table(reports: Sequence[FamilyReport]) -> str:
    """Render the results of each family as Markdown.

    Args:
        reports: One per family.

    Returns:
        Markdown: what was tried, with which versions and when, one row per family, and the
        reasons of what was refused.
    """
    steps = [name for name in STEPS if any(name in report.results for report in reports)]
    reasons: dict[str, int] = {}
    rows = [
        "| family | published in | " + " | ".join(steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for report in reports:
        cells = [_cell(report.results.get(step, ""), reasons) for step in steps]
        wrappers = [f"`{name}`" for name, held in PUBLISHED_IN.items() if held == report.family]
        rows.append(
            f"| `{report.family}` | " + " | ".join([", ".join(wrappers), *cells]) + " |"
        )
    columns = [_PUBLISHED, *(f"- **{name}**: {STEPS[name]}" for name in steps)]
    notes = [f"[{number}] {reason}" for reason, number in reasons.items()]
    counts = [
        f"{sum(_holds(report, step) for report in reports)} {verb}"
        for step, verb in _VERBS.items()
        if step in steps
    ]
    today = dt.datetime.now(tz=dt.timezone.utc).date().isoformat()
    head = (
        f"Of {len(reports)} families: {', '.join(counts)}. Tiny random checkpoints (4 layers, "
        "8 experts, hidden size 64), "
        f"{_versions()}, {today}, {platform.machine()} without a GPU: engines were built, none "
        "was run."
    )
    return "\n".join([*_TITLE, head, "", *columns, "", *rows, "", *notes]) + "\n"


def _cell(result: str, reasons: dict[str, int]) -> str:
    if not _is_refused(result):
        return result
    _, _, reason = result.partition(": ")
    reason = reason.partition(" Calibration, pruning")[0].replace("|", "/").replace("\n", " ")
    number = reasons.setdefault(reason, len(reasons) + 1)
    return f"no [{number}]"


def _holds(report: FamilyReport, step: str) -> bool:
    result = report.results.get(step, "no")
    return not _is_refused(result) and result != "loaded whole"


def _is_refused(result: str) -> bool:
    return result.startswith("no")


def _versions() -> str:
    installed = {
        distribution.metadata["Name"]: distribution.version
        for distribution in importlib.metadata.distributions()
    }
    return ", ".join(f"{name} {installed[name]}" for name in _PACKAGES if name in installed)
