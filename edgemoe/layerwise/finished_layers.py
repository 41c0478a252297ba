"""The finished layers of a pass, in its work directory: states, and the last one's outputs."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from safetensors.torch import load_file, save

from edgemoe.layerwise.outputs import LayerOutputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch

    from edgemoe.resume import WorkDirectory

Restore: TypeAlias = "Callable[[int, Callable[[], Mapping[str, torch.Tensor]]], None]"

_PREFIX = "pass-"
_PROGRESS = f"{_PREFIX}progress.json"


class FinishedLayers:
    """What a pass goes on from after an interruption."""

    def __init__(self, work: WorkDirectory, digest: str) -> None:
        """Use a directory.

        Args:
            work: The directory; another pass may have left something there.
            digest: What tells this pass from others.
        """
        self._work = work
        self._digest = digest
        self._done = 0
        self._last: int | None = None

    def recall(self, restore: Restore, layers: Sequence[int]) -> int:
        """Give a task the states that an earlier process kept; forget those of other passes.

        Args:
            restore: Takes the state of a layer, from its index and what reads it.
            layers: The decoder layers of the pass.

        Returns:
            How many of them are finished.
        """
        found = self._work.read(_PROGRESS)
        if found is None or found["digest"] != self._digest:
            self.remove()
            return 0
        self._done = int(found["layers_done"])
        self._last = layers[self._done - 1]
        for index in layers[: self._done]:
            if (self._work.path / _state_name(index)).exists():
                restore(index, partial(read_state, self._work, index))
        return self._done

    def outputs(self) -> LayerOutputs:
        """Return what the last finished layer returned."""
        assert self._last is not None
        return LayerOutputs.reopen(self._work.path / outputs_name(self._last))

    def keep(self, index: int, state: Mapping[str, torch.Tensor]) -> None:
        """Note that a layer is finished.

        Args:
            index: Of the decoder layer.
            state: What must not be lost of it.
        """
        self._done += 1
        if state:
            whole = {name: tensor.cpu().contiguous() for name, tensor in state.items()}
            self._work.write_bytes(_state_name(index), save(whole))
        self._work.write(_PROGRESS, {"digest": self._digest, "layers_done": self._done})
        if self._last is not None:
            self._work.remove(outputs_name(self._last))
        self._last = index

    def remove(self) -> None:
        """Forget the pass."""
        self._work.remove(_PROGRESS)
        for path in self._work.path.glob(f"{_PREFIX}*"):
            self._work.remove(path.name)


def layers_done(work: WorkDirectory) -> int:
    """Return how many layers a pass has finished; 0 where it is not under way.

    Args:
        work: Its directory.
    """
    found = work.read(_PROGRESS)
    return 0 if found is None else int(found["layers_done"])


def read_state(work: WorkDirectory, index: int) -> dict[str, torch.Tensor]:
    """Read what must not be lost of a finished layer.

    Args:
        work: The directory of the pass.
        index: Of the decoder layer.
    """
    return load_file(work.path / _state_name(index))


def outputs_name(index: int) -> str:
    """Name the directory of what a layer returned.

    Args:
        index: Of the decoder layer.
    """
    return f"{_PREFIX}outputs-{index:05}"


def _state_name(index: int) -> str:
    return f"{_PREFIX}state-{index:05}.safetensors"
