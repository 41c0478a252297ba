"""Run a model over task files and sum what its MoE layers do.

Each line is read alone, in windows that do not overlap, one window per forward pass. What
a window adds therefore depends on nothing but itself, and shards add up to the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from edgemoe.calibrate.statistics import Source, Statistics, TaskStatistics
from edgemoe.calibrate.sums import LayerSums
from edgemoe.errors import TaskFileError
from edgemoe.models.hooks import observe
from edgemoe.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tokenizers import Tokenizer

    from edgemoe.calibrate.sums import Float64
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.hooks import ExpertsFunction
    from edgemoe.models.layer import MoeLayer
    from edgemoe.models.routers import Routing
    from edgemoe.tasks import TaskFile

SEQUENCE_LENGTH = 512


@dataclass(frozen=True, kw_only=True)
class _Window:
    """Tokens of one forward pass, and the line that they are from."""

    line: int
    ids: list[int]


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
            ``max_tokens`` leaves. The shards of one call add up to that call unsharded.

    Returns:
        The sums of every task.

    Raises:
        TaskFileError: No task has a token in this shard, or an argument is out of range.
    """
    index, of = shard
    if not 0 <= index < of:
        raise TaskFileError(f"a shard's index must be in [0, {of}), got {index}.")
    for name, value in (("max_tokens", max_tokens), ("sequence_length", sequence_length)):
        if value is not None and value < 1:
            raise TaskFileError(f"{name} must be in [1, inf), got {value}.")
    longest = getattr(model.config, "max_position_embeddings", None) or sequence_length
    sequence_length = min(sequence_length, int(longest))
    windows = {
        task.name: _shard_windows(
            _cut_windows(task, tokenizer, max_tokens, sequence_length), shard
        )
        for task in tasks
    }
    if not any(windows.values()):
        raise TaskFileError(
            f"shard {index} of {of} must have a token, got none of {len(tasks)} tasks. Use "
            "fewer shards or more lines."
        )
    return Statistics(
        checkpoint_sha256=model.sha256,
        shape=model.shape,
        tasks={
            task.name: TaskStatistics(
                sources=(
                    Source(
                        sha256=task.sha256,
                        lines=len({window.line for window in windows[task.name]}),
                        tokens=sum(len(window.ids) for window in windows[task.name]),
                        shard=shard,
                        sequence_length=sequence_length,
                    ),
                ),
                layers=_sum_windows(model, windows[task.name], f"calibrate {task.name}"),
            )
            for task in tasks
        },
    )


def _cut_windows(
    task: TaskFile, tokenizer: Tokenizer, max_tokens: int | None, sequence_length: int
) -> list[_Window]:
    windows: list[_Window] = []
    left = max_tokens
    for record in task.records:
        ids = tokenizer.encode(record.calibration_text).ids[:left]
        windows.extend(
            _Window(line=record.line, ids=ids[start : start + sequence_length])
            for start in range(0, len(ids), sequence_length)
        )
        if left is not None:
            left -= len(ids)
            if left == 0:
                break
    return windows


def _shard_windows(windows: list[_Window], shard: tuple[int, int]) -> list[_Window]:
    index, of = shard
    return [window for window in windows if (window.line - 1) % of == index]


def _sum_windows(
    model: MoeModel, windows: list[_Window], description: str
) -> dict[int, LayerSums]:
    sums = {layer.index: LayerSums.zeros(layer.num_experts) for layer in model.layers}

    def add(
        layer: MoeLayer, hidden: torch.Tensor, routing: Routing, run_expert: ExpertsFunction
    ) -> None:
        norms = _output_norms(hidden, routing.indices, layer.num_experts, run_expert)
        sums[layer.index] += LayerSums.of_tokens(
            _float64(routing.logits),
            _float64(routing.weights),
            routing.indices.cpu().numpy(),
            norms,
        )

    # The layers below the head are all that the sums need.
    decoder = model.model.base_model
    with torch.inference_mode(), observe(model, add):
        for window in track(windows, description):
            ids = torch.tensor([window.ids], device=model.model.device)
            decoder(input_ids=ids, use_cache=False)
    return sums


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
