"""Where a model's decoder layers are: all in memory, or read from the checkpoint one by one."""

from __future__ import annotations

import contextlib
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

from edgemoe.errors import StreamingError
from edgemoe.models.checkpoint import Checkpoint, load_model
from edgemoe.models.contract import MoeModel
from edgemoe.models.decoder import find_layers
from edgemoe.models.opening import open_larger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from edgemoe.models.opening import StreamedModel
    from edgemoe.models.weights.fingerprint import FileHashes


class LayerProvider(Protocol):
    """A model whose decoder layers can be held in memory."""

    @property
    def moe(self) -> MoeModel:
        """The kit's view of the model."""
        ...

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model."""
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

    @property
    def device(self) -> torch.device | str:
        """Where layers compute."""
        ...

    def outer(self) -> AbstractContextManager[object]:
        """Hold what belongs to no layer and comes before them."""
        ...

    def layer(self, index: int) -> AbstractContextManager[object]:
        """Hold one decoder layer, in a block of `outer` where it is to run."""
        ...

    def head(self) -> AbstractContextManager[object]:
        """Hold what follows the layers, in a block of `outer`."""
        ...


class InMemoryLayers:
    """A model that is loaded whole; any language model of transformers, with experts or not."""

    is_whole = True

    def __init__(self, model: MoeModel | PreTrainedModel) -> None:
        """Wrap a model.

        Args:
            model: The model. Where its decoder does not keep its layers in a list, asking for
                them raises `edgemoe.errors.StreamingError`.
        """
        self._moe = model if isinstance(model, MoeModel) else None
        self.model: PreTrainedModel = model.model if isinstance(model, MoeModel) else model

    @property
    def moe(self) -> MoeModel:
        """The kit's view of the model, which must have experts."""
        assert self._moe is not None
        return self._moe

    @cached_property
    def _found(self) -> tuple[nn.Module, nn.ModuleList, str]:
        return find_layers(self.model)

    @property
    def decoder(self) -> nn.Module:
        """What turns token ids into hidden states."""
        return self._found[0]

    @property
    def layers(self) -> nn.ModuleList:
        """Its decoder layers."""
        return self._found[1]

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.model.device
        return device

    def outer(self) -> AbstractContextManager[object]:
        """Hold what belongs to no layer."""
        return contextlib.nullcontext()

    def layer(self, index: int) -> AbstractContextManager[object]:
        """Hold one decoder layer."""
        del index
        return contextlib.nullcontext()

    def head(self) -> AbstractContextManager[object]:
        """Hold what follows the layers."""
        return contextlib.nullcontext()


class StreamedLayers:
    """A checkpoint that is larger than memory."""

    is_whole = False

    def __init__(
        self,
        streamed: StreamedModel,
        hashes: FileHashes | None = None,
        inside: Callable[[int], AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        """Wrap a checkpoint that is open.

        Args:
            streamed: The checkpoint.
            hashes: Its files' hashes, advanced with each layer that is read: the file is in the
                system's cache then.
            inside: Makes a context that each layer is held in, from its index; its weights are
                in memory then, and may be others until it ends.
        """
        self.moe = streamed.moe
        self.model = streamed.moe.model
        self._skeleton = streamed.skeleton
        self._hashes = hashes
        self._inside = inside
        self.decoder, self.layers = streamed.skeleton.decoder, streamed.skeleton.layers
        self.device = streamed.skeleton.device

    def outer(self) -> AbstractContextManager[object]:
        """Hold what belongs to no layer and comes before them."""
        return self._skeleton.outer()

    @contextlib.contextmanager
    def layer(self, index: int) -> Iterator[None]:
        """Hold one decoder layer."""
        if self._hashes is not None:
            for file, end in self._skeleton.extent_of(index).items():
                self._hashes.advance(file, end)
        with self._skeleton.layer(index), self._inside(index):
            yield

    def head(self) -> AbstractContextManager[object]:
        """Hold what follows the layers, in a block of `outer`."""
        return self._skeleton.head()


def open_layers(path: Path | Checkpoint, limit_bytes: int | None = None) -> LayerProvider:
    """Open a checkpoint, whole where it fits into memory.

    Args:
        path: The checkpoint.
        limit_bytes: As in `edgemoe.models.opening.open_larger`.

    Returns:
        The model.

    Raises:
        CheckpointError: The checkpoint is missing, unsafe or inconsistent.
        FamilyError: The family is not supported.
    """
    checkpoint = Checkpoint.open(path)
    larger = open_larger(checkpoint, limit_bytes)
    return InMemoryLayers(load_model(checkpoint)) if larger is None else StreamedLayers(larger)


def whole_model(provider: LayerProvider, what: str) -> PreTrainedModel:
    """Return a model that is in memory.

    Args:
        provider: Where it is.
        what: What needs it, for the message.

    Returns:
        The model.

    Raises:
        StreamingError: It is not.
    """
    if not provider.is_whole:
        raise StreamingError(
            f"{what} must have the whole model in memory, got one that is larger than half of "
            "what is free. Use a machine with more memory."
        )
    return provider.model
