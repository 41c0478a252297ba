"""Change layer after layer in closed form, and go on where an earlier run was killed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from edgemoe.calibrate.sample import Window
from edgemoe.errors import RecoveryError, StreamingError
from edgemoe.layerwise.provider import InMemoryLayers
from edgemoe.layerwise.returned import hidden_of
from edgemoe.layerwise.runner import LayerTask, Visit, run_layer, run_layers
from edgemoe.oracle.oracle import batches_of, view_layer
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
from edgemoe.resume import WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from edgemoe.layerwise.returned import Outputs
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.recover.samples import TaskSamples
    from edgemoe.recover.state import TrainingState
    from edgemoe.recover.trainer import TrainingTask


def refit(
    training_task: TrainingTask, state: TrainingState, *, checkpoint_seconds: float
) -> float | None:
    """Change every MoE layer, from where the state is.

    Args:
        training_task: What to change, and on what.
        state: Where the work is; at the end its progress says `ended`.
        checkpoint_seconds: Not used: a run that is killed loses the layer that it was at.

    Returns:
        Seconds per MoE layer; None where none was left.

    Raises:
        RecoveryError: The teacher has other layers.
        StreamingError: A model's layers cannot be run one by one.
    """
    del checkpoint_seconds  # each layer that is finished is kept
    if "ended" in state.progress:
        return None
    begun = time.monotonic()
    visited = _Refit(training_task, state).finish()
    return (time.monotonic() - begun) / visited if visited else None


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


class _Refit(LayerTask):
    """Visits the layers of both models: what a layer gives on is the teacher's and ours."""

    def __init__(self, training_task: TrainingTask, state: TrainingState) -> None:
        assert training_task.teacher is not None
        self._task, self._state = training_task, state
        self._rows = _Rows.of(training_task.tasks)
        self._batches = batches_of(self._rows.windows)
        self._teacher = InMemoryLayers(training_task.teacher)
        self._student = InMemoryLayers(training_task.student)
        self._layers = {layer.index: layer for layer in training_task.student.layers}
        self._changed: list[int] = []
        self._visited = 0
        ours, theirs = len(self._student.layers), len(self._teacher.layers)
        sizes = (training_task.teacher.config.get_text_config().hidden_size, theirs)
        if sizes != (training_task.student.shape.hidden_size, ours):
            raise RecoveryError(
                "a teacher of least-squares must have the model's hidden size "
                f"{training_task.student.shape.hidden_size} and its {ours} decoder layers, got "
                f"{sizes[0]} and {sizes[1]}. Give the checkpoint that the model was compressed "
                "from."
            )

    def finish(self) -> int:
        """Visit all decoder layers that are left; return how many MoE layers those were."""
        work = WorkDirectory(self._state.work.path / "layers")
        work.path.mkdir(exist_ok=True)
        run_layers(
            self._student,
            self._batches,
            self,
            description="least squares",
            layers=range(max(self._layers) + 1),
            work=work,
            name="least-squares",
        )
        step = int(self._state.progress["step"]) + len(self._layers)
        progress: dict[str, Any] = {**self._state.progress, "step": step, "ended": "all layers"}
        if self._changed:
            parameters = self._task.training.parameters
            progress["best_step"] = len(self._changed)
            progress["best_file"] = self._state.save_best(step, parameters)
        self._state.save(progress)
        return self._visited

    def visit(self, visit: Visit) -> Iterable[Outputs]:
        """Change one layer, if that helps."""
        index = visit.index
        # Pairs of what teacher and student hand on; before the first layer there is nothing.
        before: list[Any] = list(visit.before)
        given = [[pair and pair[number] for pair in before] for number in range(2)]
        theirs = list(run_layer(self._teacher, index, self._batches, given[0]))
        ours = Visit(self._student, self._batches, index, given[1])
        layer = self._layers.get(index)
        if layer is None:
            return zip(theirs, ours.run(), strict=True)
        self._visited += 1
        returned, is_changed = self._change(layer, ours, theirs)
        if is_changed:
            self._changed.append(index)
        return zip(theirs, returned, strict=True)

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """Return what was found for a layer."""
        return self._tensors(self._layers[index]) if index in self._changed else {}

    def restore(self, index: int, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Give a layer what an earlier run found for it."""
        found = read()
        for name, tensor in self._tensors(self._layers[index]).items():
            tensor.copy_(found[name])
        self._changed.append(index)

    def _change(
        self, layer: MoeLayer, visit: Visit, theirs: Sequence[Outputs]
    ) -> tuple[list[Outputs], bool]:
        """Change one layer, if that helps; return what it gives now."""
        shared = shared_modules(layer)
        with watching(shared) as given:
            returned, view = view_layer(visit, layer)
        error = rows_of(theirs) - rows_of(returned)
        if error.shape != view.hidden.shape:
            raise StreamingError(
                "least-squares must have layers that return one hidden state per token, got "
                f"{tuple(error.shape)} of {len(view.hidden)} tokens of {view.hidden.shape[1]}. "
                "Use another method, such as router-kd."
            )
        blocks, modules = routed_blocks(view), []
        for module, kept in zip(shared, given, strict=True):
            gate = self._gate(visit, module, returned, torch.cat(kept))
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
        now = list(visit.run())
        left = (rows_of(theirs) - rows_of(now))[cut:].double().square().sum()
        if float(left) < change.error:
            return now, True
        for name, tensor in tensors.items():
            tensor.copy_(copies[name])
        return returned, False

    def _gate(
        self,
        visit: Visit,
        module: nn.Linear,
        returned: Sequence[Outputs],
        given: torch.Tensor,
    ) -> torch.Tensor | None:
        """Find what a shared expert's output is multiplied by, by doubling it."""
        expected = nn.functional.linear(given, module.weight)
        # Most families multiply by nothing, and one window shows that.
        for windows in (slice(1), slice(None)):
            batches, before = self._batches[windows], list(visit.before)[windows]
            with _doubled(module):
                moved = rows_of(list(run_layer(self._student, visit.index, batches, before)))
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


def rows_of(outputs: Sequence[Outputs]) -> torch.Tensor:
    """Put the hidden states that a layer returned for several windows together.

    Args:
        outputs: What it returned for each.

    Returns:
        [tokens of all windows, hidden].
    """
    return torch.cat([hidden_of(one).flatten(0, -2) for one in outputs])


@contextlib.contextmanager
def _doubled(module: nn.Linear) -> Iterator[None]:
    kept = module.weight.data
    module.weight.data = 2 * kept
    try:
        yield
    finally:
        module.weight.data = kept
