"""Compare the graphs of a bundle with one that has all experts, and with the checkpoint."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from edgemoe.plans.keep_all import keep_all
from edgemoe_exporters.bundle.task_experts import count_parameters
from edgemoe_exporters.precision import PRECISIONS
from edgemoe_exporters.sources.task_model import TaskModel
from edgemoe_exporters.validation.graph_runner import GraphRunner
from edgemoe_exporters.validation.parity_text import sample_tokens
from edgemoe_exporters.validation.sliced_runner import stored_bytes, weight_bytes
from edgemoe_exporters.validation.speed import (
    LEAST_LENGTH,
    answering_checkpoint,
    answering_graph,
    measure_speed,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgemoe_exporters.stages import ExportStages
    from edgemoe_exporters.validation.speed import Speed


def time_tasks(
    stages: ExportStages, tasks: Mapping[str, TaskModel], unpruned_bytes: int
) -> dict[str, Speed]:
    """Time every task's graph for a few seconds.

    Args:
        stages: The export, its graphs written.
        tasks: The tasks' models.
        unpruned_bytes: Size of a graph with all experts, about.

    Returns:
        Times by task; none for a target whose engine does not run here, and for graphs that
        are larger than memory.
    """
    maker = stages.maker
    if maker.target.name != "cpu" or not stages.request.speed:
        return {}
    if stages.max_length < LEAST_LENGTH:
        return {}
    paths = {name: stages.checkpointing.staged / f"{name}.onnx" for name in tasks}
    whole = {
        name: GraphRunner(path, spins=False)
        for name, path in paths.items()
        if weight_bytes(path) <= maker.limit
    }
    if not whole:
        return {}
    maker.on_stage("time the graphs")
    unpruned = None
    folder = stages.checkpointing.scratch / "unpruned"
    everything = TaskModel.of_plan(stages.source, stages.model, keep_all(stages.model.shape))
    fits = (
        unpruned_bytes <= maker.limit
        and 2 * unpruned_bytes <= shutil.disk_usage(folder.parent).free
    )
    if fits and any(stages.is_pruned(task) for task in tasks.values()):
        folder.mkdir()
        unpruned = GraphRunner(maker.write_alone(everything, "unpruned", folder), spins=False)
    tokenizer = stages.chooser.tokenizer
    found = {}
    for name, runner in whole.items():
        held_out = stages.chooser.data.held_out.get(name)
        ids = sample_tokens(held_out, tokenizer, stages.vocabulary)
        task = tasks[name]
        beside = unpruned if stages.is_pruned(task) else None
        found[name] = measure_speed(
            answering_graph(runner, ids, task.full_k),
            None if beside is None else answering_graph(beside, ids, everything.full_k),
            None if stages.source.is_streamed else answering_checkpoint(stages.source.moe, ids),
        )
    shutil.rmtree(folder, ignore_errors=True)
    return found


def estimate_unpruned(
    stages: ExportStages, tasks: Mapping[str, TaskModel], multiple: int
) -> int:
    """Return the bytes that a graph with all experts would have about.

    Args:
        stages: The export, its graphs written.
        tasks: The tasks' models.
        multiple: Widths of experts are padded to a multiple of this.

    Returns:
        Those of the first task's graph, and of the experts that it lacks.
    """
    name, task = next(iter(tasks.items()))
    everything = {name: keep_all(stages.model.shape)}
    whole = count_parameters(stages.model, everything, {}, multiple)
    here = count_parameters(task.view, {name: task.plan}, {}, multiple)
    meaning = PRECISIONS[stages.maker.precision]
    # Only experts differ: what else there is may be stored wider.
    each = meaning.bits / 8 + 4 / meaning.block if meaning.bits else meaning.numpy.itemsize
    path = stages.checkpointing.staged / f"{name}.onnx"
    return round(stored_bytes(path) + (whole - here) * each)
