"""The cache of a trace: what transformers' layers keep becomes inputs and outputs of the graph.

Layers keep what grows with the text, keys and values and the keys by which those are found, or
states of a fixed size: the latest positions of a convolution, and what linear attention knows.
A layer may keep several of one kind, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache

from edgemoe.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

KEY, VALUE, INDEXER = "key", "value", "indexer_key"
CONV, RECURRENT = "conv_state", "recurrent_state"
_ORDER = (KEY, VALUE, INDEXER, CONV, RECURRENT)
# What grows with the text, along the axis before its last.
_GROWING = frozenset({KEY, VALUE, INDEXER})


@dataclass(frozen=True)
class CacheTensor:
    """One tensor that a decoder layer keeps.

    Attributes:
        layer: Index of the decoder layer.
        kind: ``key``, ``value``, ``indexer_key``, ``conv_state`` or ``recurrent_state``; with a
            number behind it where it is not the layer's first of its kind.
        shape: Without the batch; None is the number of cached positions.
    """

    layer: int
    kind: str
    shape: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """What its input and output are called, behind a prefix."""
        return f"{self.layer}.{self.kind}"

    def zeros(self, batch: int, past: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a cache of zeros.

        Args:
            batch: Rows.
            past: Cached positions.
            dtype: Of keys and values.

        Returns:
            ``[batch, *shape]``; states are float32.
        """
        sizes = [past if size is None else size for size in self.shape]
        return torch.zeros(batch, *sizes, dtype=dtype if None in self.shape else torch.float32)


class TraceCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache whose content is the graph's inputs and outputs.

    Args:
        past: What is cached, by name; empty in a rehearsal.
        joined: Layers that compute keys and values from what is cached.

    Attributes:
        given: Keys and values by layer, as the layer's attention is to get them.
    """

    def __init__(
        self, past: Mapping[str, torch.Tensor], joined: frozenset[int] = frozenset()
    ) -> None:
        super().__init__(layers=[])
        self.past = past
        self.joined = joined
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._present: dict[tuple[int, str], torch.Tensor] = {}
        self._asked: set[tuple[int, str]] = set()
        self._turns: dict[str, tuple[int, str]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new positions, and return what the layer attends to."""
        if layer_idx in self.joined:
            past_key, past_value = self.past_pair(layer_idx, key_states, value_states)
            key_states = torch.cat([past_key, key_states], dim=2)
            value_states = torch.cat([past_value, value_states], dim=2)
            self.keep_pair(layer_idx, key_states, value_states)
        self._ask(layer_idx, KEY, 0)
        self.given[layer_idx] = key_states, value_states
        return key_states, value_states

    def past_pair(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values before the new ones."""
        if not self.past:
            return key[:, :, :0], value[:, :, :0]
        return self.past[f"{layer}.{KEY}"], self.past[f"{layer}.{VALUE}"]

    def keep_pair(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Take keys and values of all positions."""
        self._present[layer, KEY], self._present[layer, VALUE] = key, value

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Return the index keys of all positions, ``[B, ..., P + S, D]``."""
        past = self.past.get(f"{layer_idx}.{INDEXER}", indexer_key_states[..., :0, :])
        joined = torch.cat([past, indexer_key_states], dim=-2)
        self._present[layer_idx, INDEXER] = joined
        return joined

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Say nothing is cached: positions and masks are inputs of the graph."""
        return 0

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Say no: so a layer treats new tokens as it does a prompt."""
        return False

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        """Say no: a graph does not go back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Note whose turn it is, and have the layer treat new tokens as it does a prompt."""
        self._ask(layer_idx, CONV, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Note whose turn it is, and have the layer treat new tokens as it does a prompt."""
        self._ask(layer_idx, RECURRENT, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Return the new positions: the op CausalConv knows those before."""
        self._ask(layer_idx, CONV, state_idx)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Do nothing: the op LinearAttention has given the state already."""
        return recurrent_states

    def take_turn(self, kind: str, empty: torch.Tensor) -> tuple[tuple[int, str], torch.Tensor]:
        """Return the state that was asked for last.

        Args:
            kind: :data:`CONV` or :data:`RECURRENT`.
            empty: What it is at the start.

        Returns:
            For :meth:`keep`, and the state.

        Raises:
            ExportError: None was asked for.
        """
        if kind not in self._turns:
            raise ExportError(
                f"a layer must ask its cache for its {kind} before it uses it, got none: "
                f"transformers does so from 5.23 on, this is {version('transformers')}. Update "
                "it (Python 3.10 gets 5.20 at most); in 5.23 the layer is not supported."
            )
        place = self._turns[kind]
        return place, self.past.get(f"{place[0]}.{place[1]}", empty)

    def keep(self, place: tuple[int, str], state: torch.Tensor) -> None:
        """Take a new state.

        Args:
            place: What :meth:`take_turn` returned.
            state: The state.

        Raises:
            ExportError: There is one of this run already.
        """
        if place in self._present:
            raise ExportError(
                f"a layer must use its {place[1]} once per run, got twice in layer {place[0]}. "
                "This kind of layer is not supported."
            )
        self._present[place] = state

    def tensors(self) -> tuple[CacheTensor, ...]:
        """Describe the cache, after a rehearsal.

        Returns:
            What each layer keeps, in the order of the graph's inputs.

        Raises:
            ExportError: A layer has asked for a state and not used it in an op.
        """
        unanswered = sorted(self._asked - set(self._present))
        # A layer that attends some other way has keys but no op, too.
        if unanswered:
            layer, kind = unanswered[0]
            raise ExportError(
                f"what a layer keeps must go into an op of the graph, got the {kind} of layer "
                f"{layer}, which the family's code uses itself. This kind of layer is not "
                "supported."
            )
        found = dict(self._present)
        for layer, pair in self.given.items():
            # What attention got is what is cached, but where the layer computed it from that.
            found[layer, KEY], found[layer, VALUE] = pair
        return tuple(
            CacheTensor(layer, kind, _shape_of(kind, found[layer, kind]))
            for layer, kind in sorted(found, key=_place)
        )

    def present(self, tensors: Iterable[CacheTensor]) -> list[torch.Tensor]:
        """Return what is to be cached now.

        Args:
            tensors: In this order.

        Returns:
            The tensors.
        """
        return [self._present[tensor.layer, tensor.kind] for tensor in tensors]

    def _ask(self, layer: int, kind: str, index: int) -> None:
        place = layer, f"{kind}_{index}" if index else kind
        self._asked.add(place)
        self._turns[kind] = place


def _place(place: tuple[int, str]) -> tuple[int, int, str]:
    layer, kind = place
    base = next(base for base in _ORDER if kind.startswith(base))
    return layer, _ORDER.index(base), kind


def _shape_of(kind: str, tensor: torch.Tensor) -> tuple[int | None, ...]:
    sizes: list[int | None] = [int(size) for size in tensor.shape[1:]]
    if kind in _GROWING:
        sizes[-2] = None
    return tuple(sizes)
