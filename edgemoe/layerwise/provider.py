"""Where an oracle's layers are: all in memory, or read from the checkpoint one by one."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Protocol

from edgemoe.errors import StreamingError
from edgemoe.models.checkpoint import load_model
from edgemoe.models.decoder import find_layers
from edgemoe.models.opening import open_larger

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from torch import nn
    from transformers import PreTrainedModel

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.opening import StreamedModel


class Home(Protocol):
    """A model whose decoder layers can be held in memory."""

    @property
    def moe(self) -> MoeModel:
        """The kit's view of the model."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """What turns token ids into hidden states."""
        ...

    @property
    def layers(self) -> nn.ModuleList:
        """Its decoder layers."""
        ...

    @property
    def is_whole(self) -> bool:
        """Whether all layers are in memory at any time."""
        ...

    def outer(self) -> AbstractContextManager[object]:
        """Hold what belongs to no layer."""
        ...

    def layer(self, index: int) -> AbstractContextManager[object]:
        """Hold one decoder layer, in a block of :meth:`outer`."""
        ...


class MemoryHome:
    """A model that is loaded whole."""

    is_whole = True

    def __init__(self, moe: MoeModel) -> None:
        """Wrap a model.

        Args:
            moe: The model.

        Raises:
            StreamingError: Its decoder does not keep its layers in a list.
        """
        self.moe = moe
        self.decoder, self.layers, _ = find_layers(moe.model)

    def outer(self) -> AbstractContextManager[object]:
        """Hold what belongs to no layer."""
        return contextlib.nullcontext()

    def layer(self, index: int) -> AbstractContextManager[object]:
        """Hold one decoder layer."""
        del index
        return contextlib.nullcontext()


class StreamedHome:
    """A checkpoint that is larger than memory."""

    is_whole = False

    def __init__(self, streamed: StreamedModel) -> None:
        """Wrap a checkpoint that is open.

        Args:
            streamed: The checkpoint.
        """
        self.moe = streamed.moe
        self._skeleton = streamed.skeleton
        self.decoder, self.layers = streamed.skeleton.decoder, streamed.skeleton.layers

    def outer(self) -> AbstractContextManager[object]:
        """Hold what belongs to no layer."""
        return self._skeleton.outer()

    def layer(self, index: int) -> AbstractContextManager[object]:
        """Hold one decoder layer, in a block of :meth:`outer`."""
        return self._skeleton.layer(index)


def open_home(path: Path, limit_bytes: int | None = None) -> Home:
    """Open a checkpoint, whole where it fits into memory.

    Args:
        path: Checkpoint directory.
        limit_bytes: As in :func:`edgemoe.models.opening.open_larger`.

    Returns:
        The model.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
        StreamingError: Its decoder layers cannot be told apart.
    """
    larger = open_larger(path, limit_bytes)
    return MemoryHome(load_model(path)) if larger is None else StreamedHome(larger)


def whole_model(home: Home, what: str) -> PreTrainedModel:
    """Return a model that is in memory.

    Args:
        home: Where it is.
        what: What needs it, for the message.

    Returns:
        The model.

    Raises:
        StreamingError: It is not.
    """
    if not home.is_whole:
        raise StreamingError(
            f"{what} must have the whole model in memory, got one that is larger than half of "
            "what is free. Use a machine with more memory."
        )
    return home.moe.model
