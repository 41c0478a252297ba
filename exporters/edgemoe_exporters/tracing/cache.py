"""The cache of a trace: tensors that layers cache become inputs and outputs of the graph.

Layers cache tensors that grow with the text (keys, values and the keys of an indexer) or states
of a fixed size: the latest positions of a convolution, and the state of linear attention. A
layer may cache several of one kind, or nothing.
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
SHARED_KV, COMPRESSOR, INDEX_COMPRESSOR = "shared_kv", "compressor", "indexer_compressor"
CONV, RECURRENT = "conv_state", "recurrent_state"
# These grow with the text, along the axis before the last.
_GROWING = (KEY, VALUE, INDEXER, SHARED_KV, COMPRESSOR, INDEX_COMPRESSOR)
_ORDER = (*_GROWING, CONV, RECURRENT)


@dataclass(frozen=True)
class CacheTensor:
    """One tensor that a decoder layer caches.

    Attributes:
        layer: Index of the decoder layer.
        kind: `key`, `value`, `indexer_key`, `shared_kv`, `compressor`, `indexer_compressor`,
            `conv_state` or `recurrent_state`; with a number behind it where it is not the
            layer's first of its kind.
        shape: Without the batch; None is the number of cached positions.
    """

    layer: int
    kind: str
    shape: tuple[int | None, ...]

    @property
    def name(self) -> str:
        """Name of its input and output, without their prefix."""
        return f"{self.layer}.{self.kind}"

    def zeros(self, batch: int, past: int, dtype: torch.dtype) -> torch.Tensor:
        """Return a cache of zeros.

        Args:
            batch: Rows.
            past: Cached positions.
            dtype: Of keys and values.

        Returns:
            `[batch, *shape]`; states are float32.
        """
        sizes = [past if size is None else size for size in self.shape]
        return torch.zeros(batch, *sizes, dtype=dtype if None in self.shape else torch.float32)


class TraceCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache whose content is the graph's inputs and outputs.

    Args:
        past: Cached tensors by name; empty in a dry run.
        joined: Layers that compute keys and values from cached tensors.
        slots: P + S: cached and new positions.

    Attributes:
        given: Keys and values by layer, as passed to the layer's attention.
    """

    def __init__(
        self,
        past: Mapping[str, torch.Tensor],
        joined: frozenset[int] = frozenset(),
        slots: int = 0,
    ) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self._updated: int | None = None
        self._new = 0
        self.past = past
        self.joined = joined
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._present: dict[tuple[int, str], torch.Tensor] = {}
        self._requests: set[tuple[int, str]] = set()
        self._latest_request: dict[str, tuple[int, str]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add new positions, and return the keys and values that the layer attends to."""
        if layer_idx in self.joined:
            past_key, past_value = self.past_pair(layer_idx, key_states, value_states)
            key_states = torch.cat([past_key, key_states], dim=2)
            value_states = torch.cat([past_value, value_states], dim=2)
            self.keep_pair(layer_idx, key_states, value_states)
        self._request(layer_idx, KEY, 0)
        self.given[layer_idx] = key_states, value_states
        self._updated = layer_idx
        return key_states, value_states

    def take_updated(self, layer: int) -> int:
        """Return whose keys and values attention gets next.

        Args:
            layer: Index of the decoder layer that attends.

        Returns:
            What `update` was called for since; a layer that runs several times for a token
            counts each time as another. The layer itself where there was no call.
        """
        found, self._updated = self._updated, None
        return layer if found is None else found

    def past_pair(
        self, layer: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values before the new ones."""
        if not self.past:
            return key[:, :, :0], value[:, :, :0]
        return self.past[f"{layer}.{KEY}"], self.past[f"{layer}.{VALUE}"]

    def keep_pair(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store keys and values of all positions."""
        self._present[layer, KEY], self._present[layer, VALUE] = key, value

    def update_indexer(self, indexer_key_states: torch.Tensor, layer_idx: int) -> torch.Tensor:
        """Return the index keys of all positions, `[B, ..., P + S, D]`."""
        return self.grow(layer_idx, INDEXER, indexer_key_states)

    def grow(self, layer: int, kind: str, states: torch.Tensor) -> torch.Tensor:
        """Add new positions to what grows with the text.

        Args:
            layer: Index of the decoder layer.
            kind: What the layer caches.
            states: Of new tokens, float `[B, ..., S, D]`.

        Returns:
            That of all positions, `[B, ..., P + S, D]`.
        """
        past = self.past.get(f"{layer}.{kind}", states[..., :0, :])
        joined = torch.cat([past, states], dim=-2)
        self._present[layer, kind] = joined
        return joined

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Return 0: positions and masks are inputs of the graph."""
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        """Return P + S, and the first slot: nothing is ever dropped from a cache."""
        self._new = query_length
        return self._slots, 0

    @property
    def is_sliding(self) -> list[bool]:
        """Return nothing: no layer drops positions."""
        return []

    @property
    def is_linear(self) -> list[bool]:
        """Return nothing, as for `is_sliding`."""
        return []

    @property
    def is_dummy(self) -> list[bool]:
        """Return nothing, as for `is_sliding`."""
        return []

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        """Return P, as of the call of `get_mask_sizes` before."""
        return self._slots - self._new

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        """Return False, so that a layer treats new tokens as it does a prompt."""
        return False

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        """Return False: a graph does not go back."""
        return False

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Record the request; None makes the layer treat new tokens as it does a prompt."""
        self._request(layer_idx, CONV, state_idx)

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """Record the request; None makes the layer treat new tokens as it does a prompt."""
        self._request(layer_idx, RECURRENT, state_idx)

    def update_conv_state(
        self, conv_states: torch.Tensor, layer_idx: int, state_idx: int = 0, **_: Any
    ) -> torch.Tensor:
        """Return the new positions: the op CausalConv knows those before."""
        self._request(layer_idx, CONV, state_idx)
        return conv_states

    def update_recurrent_state(
        self, recurrent_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> torch.Tensor:
        """Return the state unchanged: the op LinearAttention has updated it."""
        return recurrent_states

    def take_state(
        self, kind: str, empty: torch.Tensor
    ) -> tuple[tuple[int, str], torch.Tensor]:
        """Return the state that was requested last.

        Args:
            kind: `CONV` or `RECURRENT`.
            empty: Its value at the start.

        Returns:
            Its layer and kind, for `put_state`, and the state.

        Raises:
            ExportError: None was requested.
        """
        if kind not in self._latest_request:
            raise ExportError(
                f"a layer must ask its cache for its {kind} before it uses it, got none: "
                f"transformers does so from 5.23 on, this is {version('transformers')}. Update "
                "it (Python 3.10 gets 5.20 at most); in 5.23 the layer is not supported."
            )
        key = self._latest_request[kind]
        return key, self.past.get(f"{key[0]}.{key[1]}", empty)

    def put_state(self, key: tuple[int, str], state: torch.Tensor) -> None:
        """Store a new state.

        Args:
            key: Its layer and kind, as `take_state` returned them.
            state: The state.

        Raises:
            ExportError: There is one of this run already.
        """
        if key in self._present:
            raise ExportError(
                f"a layer must use its {key[1]} once per run, got twice in layer {key[0]}. "
                "This kind of layer is not supported."
            )
        self._present[key] = state

    def tensors(self) -> tuple[CacheTensor, ...]:
        """Describe the cache, after a dry run.

        Returns:
            The tensors of each layer, in the order of the graph's inputs.

        Raises:
            ExportError: A layer has requested a state and not used it in an op.
        """
        unused = sorted(self._requests - set(self._present))
        # A layer that attends some other way has keys but no op, too.
        if unused:
            layer, kind = unused[0]
            raise ExportError(
                f"what a layer keeps must go into an op of the graph, got the {kind} of layer "
                f"{layer}, which the family's code uses itself. This kind of layer is not "
                "supported."
            )
        found = dict(self._present)
        for layer, pair in self.given.items():
            # Attention's tensors are cached, unless the layer computed them from cached ones.
            found[layer, KEY], found[layer, VALUE] = pair
        return tuple(
            CacheTensor(layer, kind, _shape_of(kind, found[layer, kind]))
            for layer, kind in sorted(found, key=_order)
        )

    def present(self, tensors: Iterable[CacheTensor]) -> list[torch.Tensor]:
        """Return the tensors to cache now.

        Args:
            tensors: Their order.

        Returns:
            The tensors.
        """
        return [self._present[tensor.layer, tensor.kind] for tensor in tensors]

    def _request(self, layer: int, kind: str, index: int) -> None:
        key = layer, f"{kind}_{index}" if index else kind
        self._requests.add(key)
        self._latest_request[kind] = key


def _order(key: tuple[int, str]) -> tuple[int, int, str]:
    layer, kind = key
    base = next(base for base in _ORDER if kind.startswith(base))
    return layer, _ORDER.index(base), kind


def _shape_of(kind: str, tensor: torch.Tensor) -> tuple[int | None, ...]:
    sizes: list[int | None] = [int(size) for size in tensor.shape[1:]]
    if kind in _GROWING:
        sizes[-2] = None
    return tuple(sizes)
