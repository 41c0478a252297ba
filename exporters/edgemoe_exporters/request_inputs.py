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
    given = (*request.tasks.values(), *request.plans.values(), *request.recovered.values())
    inputs = (request.model, *given)
    check_output(request.output, *inputs, force=request.force, directory=True)
    check_checkpoint(request.model)
    if request.tasks:
        read_tasks(request.tasks, request.model)
    for path in request.plans.values():
        load_plan(path)
    for path in request.recovered.values():
        check_checkpoint(path)


_TRIED_CUTS = 4


def count_stages(request: ExportRequest) -> int:
    """Count the stages of an export, for those who show how far it is.

    Args:
        request: The request.

    Returns:
        Stages at most: what turns out not to be needed is left out.
    """
    graphs, scored = len(request.names), len(request.tasks)
    keep = request.keep_or_default
    chosen = len(request.pruned_here) if keep is None or keep < 1 else 0
    # each is pruned, then recovered by one method after the other, and compared with the model
    changed = len({*request.plans, *request.recovered}) + chosen
    recovered = len(request.recovered_here) * (1 + len(request.recover))
    if keep is None:
        # a search halves what is left of the cuts, how many these are is not known yet
        recovered *= _TRIED_CUTS
        chosen *= 2 * _TRIED_CUTS
    ladders = scored * request.ladder
    timed = ladders * (request.target == "cpu")
    # open, trace, write and verify; each graph is made and compared, each task scored twice
    beside = int(request.speed and request.target == "cpu")
    scored_all = 2 * scored + ladders + timed + beside
    return 4 + chosen + recovered + changed + 2 * graphs + scored_all
