"""Run the eager model: the logits that a graph must agree with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load, save

from edgemoe.layerwise.batch import Batch
from edgemoe.layerwise.runner import LayerTask, run_layers
from edgemoe.models.hooks import observe
from edgemoe.models.routing.routers import (
    is_near_jump,
    is_near_tie,
    probability_of,
    select,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.models.layers.layer import MoeLayer
    from edgemoe.models.routing.routers import Routing
    from edgemoe.resume import WorkDirectory

_ROW_TOKENS = 24
# Batch and lengths of successive calls; their sums are at most _ROW_TOKENS. GroupQueryAttention
# continues a batch by one token at a time only.
# How far logits may be off that follow from activations in float16, relative.
_HALF_RESOLUTION = 2**-8
_SCHEDULES = ((1, (16, 1, 1, 1, 1)), (1, (5, 4, 3)), (2, (7, 1, 1)))


@dataclass(frozen=True)
class EagerRun:
    """Logits of the eager model for one batch of rows.

    Attributes:
        ids: Token ids, int64 `[batch, tokens]`.
        steps: Lengths of the calls in which the graph gets them; their sum is `tokens`.
        logits: float32 `[batch, tokens, vocabulary]`.
        decided: bool `[batch, tokens]`: no router was near a tie up to this token.
        steady: bool `[batch, tokens]`: no gate up to this token jumps if logits change by what
            float16 rounds; all of them but in families with `sparsemixer`.
    """

    ids: np.ndarray[Any, np.dtype[np.int64]]
    steps: tuple[int, ...]
    logits: np.ndarray[Any, np.dtype[np.float32]]
    decided: np.ndarray[Any, np.dtype[np.bool_]]
    steady: np.ndarray[Any, np.dtype[np.bool_]]


class EagerRows(LayerTask):
    """Rows of real tokens for the eager model, and its logits.

    Args:
        ids: Tokens of some text; repeated where they are few.

    Attributes:
        rows: Token ids of each batch, int64 `[batch, tokens]`.
        current: The batch that the model runs.
    """

    watches = True

    def __init__(self, ids: Sequence[int]) -> None:
        needed = sum(batch * _ROW_TOKENS for batch, _ in _SCHEDULES)
        tokens = np.resize(np.asarray(ids, dtype=np.int64), needed).reshape(-1, _ROW_TOKENS)
        self.rows = []
        used = 0
        for batch, steps in _SCHEDULES:
            self.rows.append(np.ascontiguousarray(tokens[used : used + batch, : sum(steps)]))
            used += batch
        self.current = 0
        self._tied = [torch.zeros(rows.size, dtype=torch.bool) for rows in self.rows]
        self._jumping = [torch.zeros(rows.size, dtype=torch.bool) for rows in self.rows]
        self._logits: list[np.ndarray[Any, np.dtype[np.float32]]] = []

    def note_ties(
        self, layer: MoeLayer, hidden: torch.Tensor, routing: Routing, _: object
    ) -> None:
        """Record the near ties and jumps of a layer; for `edgemoe.models.hooks.observe`."""
        if layer.rule is None:
            return
        used = (routing.indices < layer.num_experts).sum(dim=-1)
        if layer.rule.idle:
            # An idle choice ties with experts too.
            used = torch.full_like(used, layer.slots)
        tied = is_near_tie(routing.logits, layer.correction_bias, layer.rule, used)
        if layer.k_rule is not None and not layer.k_rule.is_fixed:
            chosen = select(
                routing.logits, layer.correction_bias, layer.rule, layer.slots
            ).indices
            mass = probability_of(routing.logits, layer.rule).gather(-1, chosen)
            tied |= layer.k_rule.is_near_tie(hidden, mass)
        self._tied[self.current] |= tied
        self._jumping[self.current] |= is_near_jump(
            routing.logits, layer.rule, layer.slots, _HALF_RESOLUTION
        )

    def before_batch(self, number: int) -> None:
        """Note the index of the batch that runs next."""
        self.current = number

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """Return the ties and jumps so far."""
        del index
        return {
            f"{kind}.{number}": found
            for kind, rows in (("tied", self._tied), ("jumping", self._jumping))
            for number, found in enumerate(rows)
        }

    def restore(self, index: int, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Restore what an earlier process recorded."""
        del index
        tensors = read()
        numbers = range(len(self.rows))
        self._tied = [tensors[f"tied.{number}"].clone() for number in numbers]
        self._jumping = [tensors[f"jumping.{number}"].clone() for number in numbers]

    def take(self, number: int, logits: torch.Tensor) -> None:
        """Add the logits of the next batch.

        Args:
            number: Its index.
            logits: `[batch, tokens, vocabulary]`.
        """
        assert number == len(self._logits)
        self._logits.append(logits.float().numpy())

    def runs(self) -> list[EagerRun]:
        """Return the logits of each batch."""
        return [
            EagerRun(
                rows,
                steps,
                logits,
                ~np.logical_or.accumulate(tied.numpy().reshape(rows.shape), axis=1),
                ~np.logical_or.accumulate(jumping.numpy().reshape(rows.shape), axis=1),
            )
            for rows, (_, steps), logits, tied, jumping in zip(
                self.rows, _SCHEDULES, self._logits, self._tied, self._jumping, strict=True
            )
        ]


def runs_to_bytes(runs: Sequence[EagerRun]) -> bytes:
    """Serialise runs.

    Args:
        runs: The runs.

    Returns:
        A safetensors file.
    """
    arrays = {
        f"{number}/{name}": np.ascontiguousarray(array)
        for number, run in enumerate(runs)
        for name, array in (
            ("ids", run.ids),
            ("steps", np.array(run.steps)),
            ("logits", run.logits),
            ("decided", run.decided),
            ("steady", run.steady),
        )
    }
    return save(arrays)


def runs_from_bytes(content: bytes) -> list[EagerRun]:
    """Read runs that `runs_to_bytes` serialised.

    Args:
        content: A safetensors file.

    Returns:
        The runs.
    """
    arrays = load(content)
    return [
        EagerRun(
            arrays[f"{number}/ids"],
            tuple(arrays[f"{number}/steps"].tolist()),
            arrays[f"{number}/logits"],
            arrays[f"{number}/decided"],
            arrays[f"{number}/steady"],
        )
        for number in range(len(arrays) // 5)
    ]


def run_eager(
    provider: LayerProvider,
    ids: Sequence[int],
    work: WorkDirectory | None = None,
    name: str = "",
) -> list[EagerRun]:
    """Run the eager model on rows of real tokens.

    Args:
        provider: The model, in float32.
        ids: Tokens of some text; repeated where they are few.
        work: Keeps outputs of layers that are read one by one; nothing is left there.
        name: Distinguishes the model from others that use the same directory.

    Returns:
        Its logits for each schedule of calls.
    """
    asked = EagerRows(ids)
    with observe(provider.moe, asked.note_ties):
        run_layers(
            provider,
            [Batch(torch.from_numpy(rows)) for rows in asked.rows],
            asked,
            description="run the checkpoint",
            take=asked.take,
            work=work,
            name=f"eager {name}",
        )
    return asked.runs()
