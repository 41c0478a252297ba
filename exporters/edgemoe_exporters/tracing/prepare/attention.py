"""Attention in a trace.

Every family calls `cache.update(key, value, layer)` and then transformers' attention
interface. Where the tensors that the cache returned go to the interface unchanged, the op
Attention joins past and new positions. Where the model computes keys and values from cached
tensors (latent attention), the join is done in the graph and the op AttendAll gets all
positions. A dry run on the meta device finds which, and what each layer caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from edgemoe.errors import ExportError
from edgemoe_exporters.tracing import ops

if TYPE_CHECKING:
    from torch import nn

    from edgemoe_exporters.tracing.cache import TraceCache

ATTENTION = "edgemoe_trace"


@dataclass
class Attender:
    """Implements transformers' attention interface with custom ops.

    Attributes:
        cache: The cache of the current pass.
        attention_mask: int64 `[B, P + S]` of the current pass.
        passed_through: Whether each layer's keys reached the interface as the cache returned
            them.
    """

    cache: TraceCache | None = None
    attention_mask: torch.Tensor | None = None
    passed_through: dict[int, bool] = field(default_factory=dict)

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
        indices: torch.Tensor | None = None,
        block_indices: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend; the mask is the marker that `mark_mask` made.

        Some modules attend to something else than tokens: they have no layer, and no mask.
        """
        if not hasattr(module, "layer_idx"):
            scores = torch.matmul(query, key.transpose(2, 3)) * (scaling or 1.0)
            mixed = torch.matmul(torch.softmax(scores, dim=-1), value)
            return mixed.transpose(1, 2), None
        s_aux = sinks if s_aux is None else s_aux
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
        index = self.cache.take_updated(int(module.layer_idx))  # type: ignore[arg-type]
        given = self.cache.given.get(index)
        if given is None:
            raise ExportError(
                f"every layer must have a cache of its own, got none in layer {index}, which "
                "attends to another's. This way of attending is not supported."
            )
        # Indexers return a mask here, see tracing.prepare.indexers.
        selected = block_indices if indices is None else indices[:, None]
        as_cached = given[0] is key and given[1] is value
        self.passed_through[index] = as_cached and selected is None and position_bias is None
        if index in self.cache.joined:
            output = ops.attend_all(
                query,
                key,
                value,
                self.attention_mask,
                s_aux,
                selected,
                position_bias,
                scale,
                int(window),
            )
            return output, None
        past_key, past_value = self.cache.past_pair(index, key, value)
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
        self.cache.keep_pair(index, present_key, present_value)
        return output, None

    @property
    def joined(self) -> frozenset[int]:
        """Layers that, in the dry run, changed cached tensors, or do more than attend."""
        return frozenset(index for index, same in self.passed_through.items() if not same)


def mark_mask(*_: Any, local_size: int | None = None, **__: Any) -> torch.Tensor:
    """Replace transformers' masks by a marker that holds the width of the window."""
    return torch.empty((local_size or 0) + 1, 1, 1, 1, device="meta")


# transformers never forgets a registered function, which must not keep a model alive.
ACTIVE: list[Attender] = []


def _attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    return ACTIVE[-1].attend(*arguments, **options)


def register() -> None:
    """Register the attention of a trace with transformers; idempotent."""
    AttentionInterface.register(ATTENTION, _attend)
    AttentionMaskInterface.register(ATTENTION, mark_mask)
