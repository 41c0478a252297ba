"""Run a model over task files and sum what its MoE layers do.

The model is in memory whole; :mod:`edgemoe.calibrate.streamed` measures the same, bit for bit,
with one decoder layer in memory at a time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.calibrate.statistics import Statistics, TaskStatistics
from edgemoe.calibrate.sums import LayerSums
from edgemoe.calibrate.windows import SEQUENCE_LENGTH, cut_tasks
from edgemoe.models.hooks import observe
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from edgemoe.calibrate.exact import Float64
    from edgemoe.calibrate.sample import Window
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.hooks import ExpertsFunction
    from edgemoe.models.layer import MoeLayer
    from edgemoe.models.routers import Routing
    from edgemoe.tasks import TaskFile


def collect(
    model: MoeModel,
    tasks: Sequence[TaskFile],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    shard: tuple[int, int] = (0, 1),
) -> Statistics:
    """Measure tasks.

    A text line is read whole, a completion line as prompt and completion, a choice line as
    prompt and right choice. The same arguments give the same sums on the same machine.

    Args:
        model: The model to measure.
        tasks: What to measure it on.
        tokenizer: The model's tokenizer.
        max_tokens: Read exactly so many tokens of each task, from its first line on, or all
            where it has fewer; None reads all.
        sequence_length: Longest window that the model sees at once, in tokens.
        shard: ``(index, of)``: read every ``of``-th line from ``index`` on, of those that
            ``max_tokens`` leaves. The shards of one call add up to that call
            unsharded, bit for bit.

    Returns:
        The sums of every task.

    Raises:
        TaskFileError: No task has a token in this shard, or an argument is out of range.
    """
    windows = cut_tasks(
        model,
        tasks,
        tokenizer,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        shard=shard,
    )
    return Statistics(
        checkpoint_sha256=model.sha256,
        shape=model.shape,
        tasks={
            task.name: TaskStatistics(
                sources=(windows.source(task),),
                layers=_sum_windows(
                    model, windows.by_task[task.name], f"calibrate {task.name}"
                ),
            )
            for task in tasks
        },
    )


def _sum_windows(
    model: MoeModel, windows: list[Window], description: str
) -> dict[int, LayerSums]:
    sums = {layer.index: LayerSums.zeros(layer.num_experts) for layer in model.layers}

    def add(
        layer: MoeLayer, hidden: torch.Tensor, routing: Routing, run_expert: ExpertsFunction
    ) -> None:
        sums[layer.index] += sum_call(layer, hidden, routing, run_expert)

    # The layers below the head are all that the sums need.
    decoder = model.model.base_model
    with torch.inference_mode(), observe(model, add):
        for window in track(windows, description):
            ids = torch.tensor([window.ids], device=model.model.device)
            decoder(input_ids=ids, use_cache=False)
    return sums


def sum_call(
    layer: MoeLayer, hidden: torch.Tensor, routing: Routing, run_expert: ExpertsFunction
) -> LayerSums:
    """Sum what one call of an MoE layer does.

    Args:
        layer: The layer.
        hidden: What reaches its router and experts [tokens, hidden].
        routing: The routing that it uses.
        run_expert: A function from (expert, hidden [n, hidden]) to that expert's output.

    Returns:
        The sums over the call's tokens.
    """
    norms = _output_norms(hidden, routing.indices, layer.num_experts, run_expert)
    return LayerSums.of_tokens(
        _float64(routing.logits),
        _float64(routing.weights),
        routing.indices.cpu().numpy(),
        norms,
    )


def _output_norms(
    hidden: torch.Tensor, indices: torch.Tensor, experts: int, run_expert: ExpertsFunction
) -> Float64:
    """Return each used slot's expert output norm, float64 [tokens, top_k]; 0 elsewhere."""
    norms = torch.zeros(indices.shape, dtype=torch.float64, device=hidden.device)
    for expert in range(experts):
        tokens, slots = torch.where(indices == expert)
        if len(tokens):
            output = run_expert(expert, hidden[tokens])
            norms[tokens, slots] = torch.linalg.vector_norm(output.double(), dim=-1)
    return _float64(norms)


def _float64(tensor: torch.Tensor) -> Float64:
    values: Float64 = tensor.to(torch.float64).cpu().numpy()
    return np.ascontiguousarray(values)
