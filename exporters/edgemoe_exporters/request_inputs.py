"""The inputs of an export, checked before anything heavy is imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.api.arguments import load_plan, read_tasks
from edgemoe.api.checks import check_checkpoint, check_output

if TYPE_CHECKING:
    from edgemoe_exporters.request import ExportRequest


def check_request(request: ExportRequest) -> None:
    """Refuse what is wrong with a request's options and files, in a fraction of a second.

    Args:
        request: The request.

    Raises:
        EdgemoeError: An option breaks a rule, an output cannot be written, or a file is
            missing, of another kind, or malformed; the pipeline would find it later.
    """
    request.check()
    inputs = (request.model, *request.tasks.values(), *request.plans.values())
    check_output(request.output, *inputs, force=request.force, directory=True)
    check_checkpoint(request.model)
    if request.tasks:
        read_tasks(request.tasks, request.model)
    for path in request.plans.values():
        load_plan(path)


def count_stages(request: ExportRequest) -> int:
    """Count the stages of an export, for those who show how far it is.

    Args:
        request: The request.

    Returns:
        Stages at most: what turns out not to be needed is left out.
    """
    graphs, scored = len(request.names), len(request.tasks)
    chosen = len(request.pruned_here) if request.keep_or_default < 1 else 0
    ladders = scored * request.ladder
    timed = ladders * (request.target == "cpu")
    # open, trace, write and verify; each graph is made and compared, each task scored twice
    return 4 + chosen + 2 * graphs + 2 * scored + ladders + timed
