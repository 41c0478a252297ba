"""What decides the results of an export: keys of what earlier exports left."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import onnxruntime

from edgemoe.resume import resume_key
from edgemoe_exporters.request import AUTO

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe.models.checkpoint import Checkpoint
    from edgemoe.plans.plan import Plan
    from edgemoe.tasks import TaskFile
    from edgemoe_exporters.request import ExportRequest

_LIBRARIES = ("onnx", "onnx-ir", "onnxscript")


def digest_lines(task: TaskFile) -> str:
    """Hash what the lines of a task say.

    Args:
        task: The task, of which some lines may be left out.

    Returns:
        SHA-256 in hexadecimal; the lines' numbers do not count.
    """
    digest = hashlib.sha256(task.kind.encode())
    for record in task.records:
        content = {**asdict(record), "line": 0}
        digest.update(json.dumps(content, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class ExportKeys:
    """What decides results, as JSON values.

    Attributes:
        checkpoint: The checkpoint and what computes: all that is kept belongs to these.
        attempt: Everything that decides the bundle besides.
    """

    checkpoint: Mapping[str, Any]
    attempt: Mapping[str, Any]


def keys_of(
    request: ExportRequest,
    precision: str,
    checkpoint: Checkpoint,
    tasks: Mapping[str, TaskFile],
    plans: Mapping[str, Plan],
    recovered: Mapping[str, Checkpoint],
) -> ExportKeys:
    """Return everything that decides the result of an export.

    Args:
        request: The export.
        precision: Of its weights.
        checkpoint: The checkpoint.
        tasks: The task files, with all examples.
        plans: Plans that were given.
        recovered: Recovered checkpoints that were given.

    Returns:
        The keys, for `open_checkpointing`.
    """
    options = {
        "names": list(request.names),
        "target": request.target,
        "precision": precision,
        "keep": request.keep,
        "method": request.method,
        "seed": request.seed,
        "recover": list(request.recover),
        "calibration_tokens": request.calibration_tokens,
        "held_out_tokens": request.held_out_tokens,
        "ladder": request.ladder,
        "static_shapes": request.static_shapes,
    }
    if request.keep == AUTO:
        options["max_drop"] = request.max_drop
    return ExportKeys(
        checkpoint=resume_key(
            "export",
            checkpoint,
            tokenizer=checkpoint.tokenizer_sha256,
            versions={
                **{name: version(name) for name in _LIBRARIES},
                "onnxruntime": onnxruntime.__version__,
            },
        ),
        attempt={
            "tasks": {name: task.sha256 for name, task in tasks.items()},
            "plans": {name: plan.sha256 for name, plan in plans.items()},
            "recovered": {name: found.stamps() for name, found in recovered.items()},
            "options": options,
        },
    )
