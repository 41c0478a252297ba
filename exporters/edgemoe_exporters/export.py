"""Export a checkpoint as a bundle: the Python function of `edgemoe export`."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from edgemoe.api.extras import needs
from edgemoe.api.running import running
from edgemoe.errors import EdgemoeError
from edgemoe.staging import reserved
from edgemoe_exporters.request_inputs import check_request

if TYPE_CHECKING:
    from collections.abc import Callable

    from edgemoe.progress import OnProgress
    from edgemoe_exporters.report import ExportReport
    from edgemoe_exporters.request import ExportRequest


def export_bundle(
    request: ExportRequest,
    *,
    on_stage: Callable[[str], None] = lambda _: None,
    on_progress: OnProgress | None = None,
) -> ExportReport:
    """Export a checkpoint for one or more tasks.

    Without tasks the model is exported as it is. For a task without a plan, experts are chosen
    on three quarters of its examples; scores before and after are those of the others. Every
    graph is compared with the eager model that has the same weights, and with the checkpoint as
    it was. `<output>.partial` keeps statistics, scores and recovered checkpoints of an export
    that was refused or interrupted, for the next one with this output.

    Args:
        request: What to export, and where to.
        on_stage: Called with a short text at the beginning of each stage.
        on_progress: Called with an `edgemoe.progress.ProgressEvent` as work inside a stage goes
            on; None draws bars where stderr is a terminal.

    Returns:
        Sizes in bytes, parity with the eager model, quality before and after with the drop's
        interval, how often the best token is the checkpoint's, and speed.

    Raises:
        MissingDependencyError: The extra `export` or `ort` is not installed.
        ExportError: An option breaks a rule, the model has no graph, or a recovered checkpoint
            was made from another one.
        RecoveryError: A recovery refuses, or memory is too small for one.
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        TaskFileError: A task file breaks its format, is too short to be split, or has too few
            lines for `max_drop`.
        PlanError: A plan breaks its format, or does not fit the checkpoint.
        ParityError: A graph disagrees with the eager model.
        QualityGateError: A score may have fallen by more than `max_drop`, no cut holds it, or
            the checkpoint is not better than chance.
        OutputError: The output exists and `force` is false, or the disk refuses. After every
            error the output is as it was before.
    """
    needs("export", "ort")
    check_request(request)
    output, force = request.output, request.force
    with (
        running("export", "ort", on_progress=on_progress),
        reserved(output, force=force, directory=True, resumes=True),
    ):
        # Imported here: the name of this function costs no torch.
        from edgemoe.layerwise.activation_peaks import overflow_remark, recording_peaks
        from edgemoe_exporters.pipeline import run_export

        with recording_peaks() if _is_half(request) else nullcontext() as peaks:
            try:
                report = run_export(request, on_stage)
            except EdgemoeError as error:
                remark = None if peaks is None else overflow_remark(peaks)
                if remark is None:
                    raise
                # The disagreement, or the NaN, that was found has this cause most likely.
                raise type(error)(f"{error} Note: {remark}") from error
        if peaks is None or peaks.layer is None:
            return report
        remark = overflow_remark(peaks)
        return replace(
            report,
            # JSON has no infinity; the remark says it then
            largest_activation=peaks.largest if math.isfinite(peaks.largest) else None,
            remarks=report.remarks if remark is None else (*report.remarks, remark),
        )


def _is_half(request: ExportRequest) -> bool:
    """Return whether activations of the graphs are in float16."""
    _, precision = request.check()
    return precision == "fp16"
