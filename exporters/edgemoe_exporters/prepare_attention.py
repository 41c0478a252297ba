"""Attention and its cache in a trace.

Every family calls ``cache.update(key, value, layer)`` and then transformers' attention
interface. Where what the cache returned goes to the interface as it is, the op Attention joins
past and new positions. Where the model computes keys and values from what is cached (latent
attention), the join is done in the graph and the op AttendAll gets all positions. A rehearsal
without memory tells which, and what the cache of each layer holds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from edgemoe.errors import ExportError
from edgemoe_exporters import ops

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

ATTENTION = "edgemoe_trace"


@dataclass(frozen=True)
class CachedLayer:
    """What one decoder layer keeps.

    Attributes:
        heads: Of keys and of values.
        key_size: Size of a key.
        value_size: Size of a value.
        joined: Whether the model computes keys and values from what is cached.
    """

    heads: int
    key_size: int
    value_size: int
    joined: bool


class TraceCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache whose content is the graph's inputs and outputs.

    Args:
        past: Keys and values of each decoder layer, float ``[B, M, P, D]``.
        layers: What is known of them; empty in a rehearsal, when nothing is joined.
    """

    def __init__(
        self,
        past: Sequence[tuple[torch.Tensor, torch.Tensor]],
        layers: Sequence[CachedLayer] = (),
    ) -> None:
        super().__init__(layers=[])
        self.past = past
        self.cached = layers
        self.present: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *_: Any,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take new positions, and return what the layer attends to."""
        if self.cached and self.cached[layer_idx].joined:
            past_key, past_value = self.past[layer_idx]
            key_states = torch.cat([past_key, key_states], dim=2)
            value_states = torch.cat([past_value, value_states], dim=2)
            self.present[layer_idx] = key_states, value_states
        self.given[layer_idx] = key_states, value_states
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Say nothing is cached: positions and masks are inputs of the graph."""
        return 0


@dataclass
class Attender:
    """Answers transformers' attention interface with ops.

    Attributes:
        cache: The cache of the pass under way.
        attention_mask: int64 ``[B, P + S]`` of the pass under way.
        rehearsed: Whether each layer's keys went from the cache to the interface unchanged.
    """

    cache: TraceCache | None = None
    attention_mask: torch.Tensor | None = None
    rehearsed: dict[int, bool] = field(default_factory=dict)

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        s_aux: torch.Tensor | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend; the mask is the marker that :func:`mark_mask` made."""
        assert self.cache is not None
        assert self.attention_mask is not None
        if softcap:
            raise ExportError(
                f"attention scores must not be capped, got softcap={softcap}. This way of "
                "attending is not supported."
            )
        window = 0 if attention_mask is None else attention_mask.shape[0] - 1
        window = window or sliding_window or 0
        scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        index = int(module.layer_idx)  # type: ignore[arg-type]
        given = self.cache.given.get(index)
        if given is None:
            raise ExportError(
                f"every layer must have a cache of its own, got none in layer {index}, which "
                "attends to another's. This way of attending is not supported."
            )
        self.rehearsed[index] = given[0] is key and given[1] is value
        if self.cache.cached and self.cache.cached[index].joined:
            output = ops.attend_all(
                query, key, value, self.attention_mask, s_aux, scale, int(window)
            )
            return output, None
        past_key, past_value = self._past(index, key, value)
        output, present_key, present_value = ops.attention(
            query,
            key,
            value,
            past_key,
            past_value,
            self.attention_mask,
            s_aux,
            scale,
            int(window),
        )
        self.cache.present[index] = present_key, present_value
        return output, None

    def _past(
        self, index: int, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.cache is not None
        if self.cache.past:
            return self.cache.past[index]
        return key[:, :, :0], value[:, :, :0]

    def layers(self, count: int) -> tuple[CachedLayer, ...]:
        """Describe the cache, after a rehearsal.

        Args:
            count: Decoder layers of the model.

        Returns:
            One entry per decoder layer.

        Raises:
            ExportError: A layer keeps something else than keys and values.
        """
        assert self.cache is not None
        if sorted(self.cache.given) != list(range(count)):
            missing = sorted(set(range(count)) - set(self.cache.given))
            raise ExportError(
                f"every decoder layer must cache keys and values, got none in {missing}: "
                "layers that keep another state have no graph yet."
            )
        return tuple(
            CachedLayer(
                heads=key.shape[1],
                key_size=key.shape[3],
                value_size=value.shape[3],
                joined=not self.rehearsed[index],
            )
            for index, (key, value) in sorted(self.cache.given.items())
        )


def mark_mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor:
    """Answer for transformers' masks: only the width of the window is of interest."""
    return torch.empty((local_size or 0) + 1, 1, 1, 1, device="meta")


# transformers keeps what it is registered for good, and must not keep a model with it.
ACTIVE: list[Attender] = []


def _attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    return ACTIVE[-1].attend(*arguments, **options)


def register() -> None:
    """Make transformers know the attention of a trace; doing it again changes nothing."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, mark_mask)
