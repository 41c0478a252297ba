"""Change layer after layer in closed form, and go on where an earlier run was killed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save
from torch import nn

from edgemoe.calibrate.sample import Window
from edgemoe.errors import RecoveryError, StreamingError
from edgemoe.layerwise.outputs import LayerOutputs
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.layerwise.replay import map_tensors
from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.models.decoder import find_layers
from edgemoe.oracle.oracle import LayerOracle, run_windows
from edgemoe.progress import counting
from edgemoe.recover.down_projections import (
    add_routed,
    add_shared,
    gate_of,
    routed_blocks,
    routed_tensor,
    shared_modules,
    watching,
)
from edgemoe.recover.ridge import Block, fit_change

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import Any

    from edgemoe.layerwise.replay import Outputs
    from edgemoe.models.layer import MoeLayer
    from edgemoe.recover.samples import TaskSamples
    from edgemoe.recover.state import TrainingState
    from edgemoe.recover.trainer import Lesson


def refit(lesson: Lesson, state: TrainingState, *, checkpoint_seconds: float) -> float | None:
    """Change every MoE layer, from where the state is.

    Args:
        lesson: What to change, and on what.
        state: Where the work is; at the end its progress says ``ended``.
        checkpoint_seconds: How long a run may lose when it is killed.

    Returns:
        Seconds per MoE layer; None where none was left.

    Raises:
        RecoveryError: The teacher has other layers.
        StreamingError: A model's layers cannot be run one by one.
    """
    if "ended" in state.progress:
        return None
    first, begun = int(state.progress["step"]), time.monotonic()
    _Refit(lesson, state, checkpoint_seconds).finish()
    return (time.monotonic() - begun) / (int(state.progress["step"]) - first)


@dataclass(frozen=True)
class _Rows:
    """Which rows of all windows' tokens fit, and which judge.

    Attributes:
        windows: Those that fit first.
        fitting: How many tokens fit.
        weights: What each of these counts, float64 [fitting].
    """

    windows: tuple[Window, ...]
    fitting: int
    weights: torch.Tensor

    @classmethod
    def of(cls, tasks: Sequence[TaskSamples]) -> _Rows:
        fitting = [(task, r) for task in tasks for r in task.training]
        judging = [(task, r) for task in tasks for r in task.held_out]
        ids = [(*r.context, *r.continuations[0]) for _, r in (*fitting, *judging)]
        # Tasks have equal shares, however long their files are.
        tokens = {task.name: task.training_tokens for task in tasks}
        mean = sum(tokens.values()) / len(tokens)
        weights = [
            torch.full((r.longest,), mean / tokens[task.name], dtype=torch.float64)
            for task, r in fitting
        ]
        return cls(
            tuple(Window(line=0, start=0, ids=list(one)) for one in ids),
            sum(len(one) for one in ids[: len(fitting)]),
            torch.cat(weights),
        )


# Gates of float32 products come out this near.
_ONE = 1e-3


class _Refit:
    """One run, possibly over what an earlier one reached."""

    def __init__(self, lesson: Lesson, state: TrainingState, seconds: float) -> None:
        assert lesson.teacher is not None
        self._lesson, self._state, self._seconds = lesson, state, seconds
        self._rows = _Rows.of(lesson.tasks)
        self._student = LayerOracle(InMemoryLayers(lesson.student), self._rows.windows)
        self._teacher = find_layers(lesson.teacher)[:2]
        ours = len(self._student.provider.layers)
        sizes = (lesson.teacher.config.get_text_config().hidden_size, len(self._teacher[1]))
        if sizes != (lesson.student.shape.hidden_size, ours):
            raise RecoveryError(
                "a teacher of least-squares must have the model's hidden size "
                f"{lesson.student.shape.hidden_size} and its {ours} decoder layers, got "
                f"{sizes[0]} and {sizes[1]}. Give the checkpoint that the model was compressed "
                "from."
            )

    def finish(self) -> None:
        """Visit all decoder layers that are left."""
        progress: dict[str, Any] = {"changed": [], **self._state.progress}
        layers = {layer.index: layer for layer in self._lesson.student.layers}
        first, end = int(progress.get("decoder_layers", 0)), max(layers) + 1
        for index in progress["changed"]:
            self._put_back(layers[index])
        theirs, ours = (self._reopen_stream(number, first) for number in range(2))
        saved = time.monotonic()
        with quiet_transformers(), counting(end - first, "least squares") as advance:
            for index in range(first, end):
                theirs = run_windows(*self._teacher, index, self._rows.windows, theirs)
                layer = layers.get(index)
                if layer is None:
                    ours = self._student.run_layer(index, ours)
                else:
                    ours, is_changed = self._change(layer, ours, theirs)
                    progress["step"] += 1
                    if is_changed:
                        self._keep_layer(layer)
                        progress["changed"] = [*progress["changed"], index]
                progress["decoder_layers"] = index + 1
                if index + 1 < end and time.monotonic() - saved >= self._seconds:
                    self._keep_streams(progress, (theirs, ours))
                    saved = time.monotonic()
                advance()
        progress["ended"] = "all layers"
        if progress["changed"]:
            parameters = self._lesson.training.parameters
            progress["best_step"] = len(progress["changed"])
            progress["best_file"] = self._state.save_best(progress["step"], parameters)
        self._state.save(progress)

    def _change(
        self, layer: MoeLayer, before: Sequence[Outputs], theirs: Sequence[Outputs]
    ) -> tuple[list[Outputs], bool]:
        """Change one layer, if that helps; return what it gives now."""
        shared = shared_modules(layer)
        with watching(shared) as given:
            returned, view = self._student.observe(layer, before)
        error = rows_of(theirs) - rows_of(returned)
        if error.shape != view.hidden.shape:
            raise StreamingError(
                "least-squares must have layers that return one hidden state per token, got "
                f"{tuple(error.shape)} of {len(view.hidden)} tokens of {view.hidden.shape[1]}. "
                "Use another method, such as router-kd."
            )
        blocks, modules = routed_blocks(view), []
        for module, kept in zip(shared, given, strict=True):
            gate = self._gate(layer.index, module, before, returned, torch.cat(kept))
            if gate is not None:
                rows = torch.arange(len(error), device=error.device)
                blocks.append(Block(rows, torch.cat(kept) * gate[:, None]))
                modules.append(module)
        cut, end = self._rows.fitting, len(error)
        roots = self._rows.weights.sqrt()
        change = fit_change(
            [block.between(0, cut).scaled(roots) for block in blocks],
            error[:cut] * roots[:, None],
            [block.between(cut, end) for block in blocks],
            error[cut:],
        )
        if change.strength is None:
            return returned, False
        tensors = self._tensors(layer)
        copies = {name: tensor.clone() for name, tensor in tensors.items()}
        count = layer.num_experts
        add_routed(layer, change.matrices[:count])
        for module, matrix in zip(modules, change.matrices[count:], strict=True):
            add_shared(module, matrix)
        now = self._student.run_layer(layer.index, before)
        left = (rows_of(theirs) - rows_of(now))[cut:].double().square().sum()
        if float(left) < change.error:
            return now, True
        for name, tensor in tensors.items():
            tensor.copy_(copies[name])
        return returned, False

    def _gate(
        self,
        index: int,
        module: nn.Linear,
        before: Sequence[Outputs],
        returned: Sequence[Outputs],
        given: torch.Tensor,
    ) -> torch.Tensor | None:
        """Find what a shared expert's output is multiplied by, by doubling it."""
        expected = nn.functional.linear(given, module.weight)
        # Most families multiply by nothing, and one window shows that.
        for windows in (slice(1), slice(None)):
            asked = LayerOracle(self._student.provider, self._rows.windows[windows])
            with _doubled(module):
                moved = rows_of(asked.run_layer(index, before[windows]))
            moved = moved - rows_of(returned[windows])
            gate = gate_of(moved, expected[: len(moved)])
            if gate is None:
                return None
            if bool((gate - 1).abs().max() < _ONE):
                return torch.ones(len(given), device=given.device)
        return gate

    def _tensors(self, layer: MoeLayer) -> dict[str, torch.Tensor]:
        tensors = {"routed": routed_tensor(layer)}
        for number, module in enumerate(shared_modules(layer)):
            tensors[f"shared{number}"] = module.weight
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def _put_back(self, layer: MoeLayer) -> None:
        """Give a layer what an earlier run found for it."""
        found = load_file(self._state.work.path / _layer_name(layer.index))
        for name, tensor in self._tensors(layer).items():
            tensor.copy_(found[name])

    def _keep_layer(self, layer: MoeLayer) -> None:
        tensors = {name: t.cpu().contiguous() for name, t in self._tensors(layer).items()}
        self._state.work.write_bytes(_layer_name(layer.index), save(tensors))

    def _keep_streams(self, progress: dict[str, Any], streams: Sequence[list[Outputs]]) -> None:
        """Let another run go on behind this layer."""
        work, done = self._state.work, progress["decoder_layers"]
        for number, stream in enumerate(streams):
            outputs = LayerOutputs(work.empty_directory(f"stream{number}-{done:05}"))
            for returned in stream:
                outputs.append(returned)
            outputs.finish()
        older = self._state.progress.get("decoder_layers")
        self._state.save(progress)
        for number in range(len(streams)):
            work.remove(f"stream{number}-{older or 0:05}")

    def _reopen_stream(self, number: int, done: int) -> list[Outputs]:
        if not done:
            return [None] * len(self._rows.windows)
        kept = LayerOutputs.reopen(self._state.work.path / f"stream{number}-{done:05}")
        device = self._lesson.model.device
        return [map_tensors(outputs, lambda tensor: tensor.to(device)) for outputs in kept]


def rows_of(outputs: Sequence[Outputs]) -> torch.Tensor:
    """Put the hidden states that a layer returned for several windows together.

    Args:
        outputs: What it returned for each.

    Returns:
        [tokens of all windows, hidden].
    """
    rows = []
    for one in outputs:
        while isinstance(one, tuple):
            one = one[0]
        assert one is not None
        rows.append(one.flatten(0, -2))
    return torch.cat(rows)


@contextlib.contextmanager
def _doubled(module: nn.Linear) -> Iterator[None]:
    kept = module.weight.data
    module.weight.data = 2 * kept
    try:
        yield
    finally:
        module.weight.data = kept


def _layer_name(index: int) -> str:
    return f"layer_{index:05}.safetensors"
