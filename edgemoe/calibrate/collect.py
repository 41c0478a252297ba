"""Run a model over task files and sum what its MoE layers do.

The sums of a layer are added in the order of the windows, whether the model is in memory or
read one decoder layer at a time: both give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.calibrate.statistics import Statistics
from edgemoe.calibrate.sums import LayerSums
from edgemoe.calibrate.task_statistics import TaskStatistics
from edgemoe.calibrate.windows import SEQUENCE_LENGTH, cut_tasks
from edgemoe.layerwise.batch import Batch
from edgemoe.layerwise.outputs import DEFAULT_LIMIT_BYTES
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.layerwise.runner import LayerTask, run_layers
from edgemoe.models.contract import MoeModel
from edgemoe.models.hooks import observe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tokenizers import Tokenizer

    from edgemoe.calibrate.exact import Float64
    from edgemoe.calibrate.windows import Windows
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.hooks import ExpertsFunction
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing
    from edgemoe.resume import WorkDirectory
    from edgemoe.tasks import TaskFile


def collect(
    model: MoeModel | LayerProvider,
    tasks: Sequence[TaskFile],
    tokenizer: Tokenizer,
    *,
    max_tokens: int | None = None,
    sequence_length: int = SEQUENCE_LENGTH,
    shard: tuple[int, int] = (0, 1),
    work: WorkDirectory | None = None,
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
        shard: `(index, of)`: read every `of`-th line from `index` on, of those that
            `max_tokens` leaves. The shards of one call add up to that call unsharded, bit for
            bit.
        work: As in `measure`.

    Returns:
        The sums of every task.

    Raises:
        TaskFileError: No task has a token in this shard, or an argument is out of range.
        StreamingError: The model is read layer by layer, and its family cannot be run so.
    """
    layers = InMemoryLayers(model) if isinstance(model, MoeModel) else model
    windows = cut_tasks(
        layers.moe,
        tasks,
        tokenizer,
        max_tokens=max_tokens,
        sequence_length=sequence_length,
        shard=shard,
    )
    return measure(layers, tasks, windows, work)


def measure(
    layers: LayerProvider,
    tasks: Sequence[TaskFile],
    windows: Windows,
    work: WorkDirectory | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> Statistics:
    """Measure tasks that are cut into windows.

    Args:
        layers: The model to measure.
        tasks: What to measure it on.
        windows: Their windows.
        work: For what the layers of a larger checkpoint returned and summed: a run that was
            interrupted goes on there.
        limit_bytes: Memory for what layers returned, where there is `work`.

    Returns:
        The sums of every task.

    Raises:
        StreamingError: The model is read layer by layer, and its family cannot be run so.
    """
    sums = _TaskSums(layers.moe, windows)
    with observe(layers.moe, sums.add):
        run_layers(
            layers,
            [
                Batch(torch.tensor([window.ids]))
                for found in windows.by_task.values()
                for window in found
            ],
            sums,
            description="calibrate",
            # No layer above the last with experts is needed.
            layers=range(max(layer.index for layer in layers.moe.layers) + 1),
            work=work,
            name="calibrate",
            limit_bytes=limit_bytes,
        )
    return Statistics(
        checkpoint_sha256=layers.moe.sha256,
        shape=layers.moe.shape,
        tasks={
            task.name: TaskStatistics(
                sources=(windows.source(task),), layers=sums.by_task[task.name]
            )
            for task in tasks
        },
    )


class _TaskSums(LayerTask):
    """Sums the calls of MoE layers, for each task and layer."""

    watches = True

    def __init__(self, model: MoeModel, windows: Windows) -> None:
        self.by_task = {
            name: {layer.index: LayerSums.zeros(layer.num_experts) for layer in model.layers}
            for name in windows.by_task
        }
        self._owners = [name for name, found in windows.by_task.items() for _ in found]
        self._task = ""

    def add(
        self, layer: MoeLayer, hidden: torch.Tensor, routing: Routing, run: ExpertsFunction
    ) -> None:
        self.by_task[self._task][layer.index] += sum_call(layer, hidden, routing, run)

    def before_batch(self, number: int) -> None:
        self._task = self._owners[number]

    def state(self, index: int) -> dict[str, torch.Tensor]:
        return {
            f"{number}/{name}": torch.from_numpy(array)
            for number, sums in enumerate(self.by_task.values())
            if index in sums
            for name, array in sums[index].to_arrays().items()
        }

    def restore(self, index: int, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        tensors = read()
        for number, sums in enumerate(self.by_task.values()):
            prefix = f"{number}/"
            sums[index] = LayerSums.from_arrays(
                {
                    name.removeprefix(prefix): tensor.numpy()
                    for name, tensor in tensors.items()
                    if name.startswith(prefix)
                }
            )


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
        _float64(routing.logits[:, : layer.num_experts]),
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
