"""Run batches through a whole checkpoint with one decoder layer in memory at a time."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from safetensors.numpy import load, save

from edgemoe.layerwise.outputs import DEFAULT_LIMIT_BYTES, LayerOutputs
from edgemoe.layerwise.replay import only_head, only_layer
from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.progress import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np
    import torch

    from edgemoe.models.opening import StreamedModel
    from edgemoe.resume import WorkDirectory

_PREFIX = "pass-"
_PROGRESS = f"{_PREFIX}progress.json"

Layer: TypeAlias = "Callable[[int], AbstractContextManager[Any]]"


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        ids: Token ids, int64 ``[rows, tokens]``.
        logits_to_keep: Last positions that logits are wanted of; 0 for all.
    """

    ids: torch.Tensor
    logits_to_keep: int = 0

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Arguments of the decoder."""
        return {"input_ids": self.ids, "use_cache": False}


class PassState(Protocol):
    """What a pass gathers while its layers run, to be kept with each finished one."""

    def to_arrays(self) -> dict[str, np.ndarray[Any, Any]]:
        """Return what was gathered."""
        ...

    def restore(self, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
        """Take what :meth:`to_arrays` returned in an earlier process."""
        ...


def run_batches(
    streamed: StreamedModel,
    batches: Sequence[Batch],
    take: Callable[[int, torch.Tensor], None],
    work: WorkDirectory,
    *,
    name: str,
    description: str,
    inside: Layer = contextlib.nullcontext,
    on_batch: Callable[[int], None] = lambda _: None,
    state: PassState | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> None:
    """Give every batch's logits, as the model gives them when it is in memory whole.

    A pass that was interrupted goes on after its last finished layer, in the same work
    directory and with the same batches.

    Args:
        streamed: The checkpoint.
        batches: What to run.
        take: Called with each batch's number and logits ``[rows, positions, vocabulary]``.
        work: For what layers returned; nothing is left there when the pass has ended.
        name: What tells the pass from others in the same directory.
        description: What the progress bar says.
        inside: Makes a context that each decoder layer runs in, from its index; the layer's
            weights are in memory then.
        on_batch: Called with a batch's number before a layer runs it.
        state: What is gathered besides.
        limit_bytes: Memory for what layers returned; the rest is read from files.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    skeleton = streamed.skeleton
    count = len(skeleton.layers)
    kept = _Kept(work, _digest(name, batches), state)
    first, before = kept.recall()
    with (
        quiet_transformers(),
        skeleton.outer(),
        counting((count + 1 - first) * len(batches), description) as advance,
    ):
        for index in range(first, count):
            # Those of the layer before are in memory too.
            outputs = LayerOutputs(kept.directory(index), limit_bytes // 2)
            with (
                skeleton.layer(index),
                inside(index),
                only_layer(skeleton.decoder, skeleton.layers, index) as run,
            ):
                earlier = itertools.repeat(None) if before is None else iter(before)
                for number, (batch, given) in enumerate(zip(batches, earlier, strict=False)):
                    on_batch(number)
                    outputs.append(run(batch.inputs, given))
                    advance()
            outputs.finish()
            kept.keep(index)
            before = outputs
        assert before is not None
        with skeleton.head(), only_head(skeleton.model, skeleton.layers) as finish:
            for number, (batch, given) in enumerate(zip(batches, before, strict=True)):
                arguments = {**batch.inputs, "logits_to_keep": batch.logits_to_keep}
                take(number, finish(arguments, given).logits)
                advance()
    kept.remove()


class _Kept:
    """The finished layers of a pass, in files."""

    def __init__(self, work: WorkDirectory, digest: str, state: PassState | None) -> None:
        self._work = work
        self._digest = digest
        self._state = state

    def recall(self) -> tuple[int, LayerOutputs | None]:
        """Return how many layers are finished, and what the last of them returned."""
        done = self._work.read(_PROGRESS)
        if done is None or done["digest"] != self._digest:
            self.remove()
            return 0, None
        count = int(done["layers_done"])
        if self._state is not None:
            self._state.restore(load((self._work.path / _state_name(count)).read_bytes()))
        return count, LayerOutputs.reopen(self._work.path / _outputs_name(count - 1))

    def directory(self, index: int) -> Path:
        """Make the directory for what a layer returns."""
        return self._work.empty_directory(_outputs_name(index))

    def keep(self, index: int) -> None:
        """Note that a layer is finished."""
        count = index + 1
        if self._state is not None:
            self._work.write_bytes(_state_name(count), save(self._state.to_arrays()))
        self._work.write(_PROGRESS, {"digest": self._digest, "layers_done": count})
        self._work.remove(_outputs_name(index - 1))
        self._work.remove(_state_name(count - 1))

    def remove(self) -> None:
        """Forget the pass."""
        self._work.remove(_PROGRESS)
        for path in self._work.path.glob(f"{_PREFIX}*"):
            self._work.remove(path.name)


def _digest(name: str, batches: Sequence[Batch]) -> str:
    digest = hashlib.sha256(f"{name}\n".encode())
    for batch in batches:
        digest.update(f"{tuple(batch.ids.shape)} {batch.logits_to_keep}\n".encode())
        digest.update(batch.ids.contiguous().numpy().data)
    return digest.hexdigest()


def _outputs_name(index: int) -> str:
    return f"{_PREFIX}outputs-{index:05}"


def _state_name(count: int) -> str:
    return f"{_PREFIX}state-{count:05}.safetensors"
