"""Sparse attention in a trace: a custom op selects the keys that a token attends to.

An indexer returns indices of keys or of blocks to the attention interface; here it returns a
mask that is added to the scores of attention.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from edgemoe_exporters.tracing import ops

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable

    from torch import nn

    from edgemoe_exporters.tracing.prepare.attention import Attender


_OF_BLOCKS = "MiniMaxM3VLIndexer"
_MASK = "attention_mask"


def replace_indexers(stack: contextlib.ExitStack, model: nn.Module, attender: Attender) -> None:
    """Replace indexers' selection by the ops SelectKeys and SelectBlocks.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
        attender: Has the mask of the current pass.
    """
    for module in model.modules():
        if type(module).__name__ == _OF_BLOCKS:
            module.forward = functools.partial(_choose_blocks, attender, module)
        elif type(module).__name__.endswith("Indexer") and _takes_mask(module):
            module.forward = functools.partial(_choose_keys, attender, module.forward)
        else:
            continue
        stack.callback(delattr, module, "forward")


def _takes_mask(module: nn.Module) -> bool:
    return _MASK in inspect.signature(module.forward).parameters


def _choose_keys(
    attender: Attender, forward: Callable[..., torch.Tensor], *arguments: Any, **options: Any
) -> torch.Tensor:
    """Replace an indexer that masks its scores and takes the indices of the highest."""
    given = inspect.signature(forward).bind(*arguments, **options)
    given.arguments[_MASK] = _IndexerMask(attender)
    return forward(*given.args, **given.kwargs)


def _choose_blocks(
    attender: Attender,
    module: Any,
    hidden_states: torch.Tensor,
    position_embeddings: tuple[torch.Tensor, torch.Tensor],
    *_: object,
) -> torch.Tensor:
    """Replace MiniMax-M3's indexer."""
    assert attender.cache is not None
    assert attender.attention_mask is not None
    shape = (*hidden_states.shape[:2], -1, module.head_dim)
    query = module.q_norm(module.q_proj(hidden_states).view(shape)).transpose(1, 2)
    key = module.k_norm(module.k_proj(hidden_states).view(shape)).transpose(1, 2)
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb
    query, key = rotate(query, key, *position_embeddings)
    key = attender.cache.update_indexer(key, module.layer_idx)
    scores = query.float() @ key.float().transpose(-1, -2)
    chosen: torch.Tensor = ops.select_blocks(
        scores,
        attender.attention_mask,
        module.block_size,
        module.topk_blocks,
        module.local_blocks,
    )
    return chosen


class _IndexerMask:
    """A proxy for a mask that is added to scores."""

    dtype = torch.float32

    def __init__(self, attender: Attender) -> None:
        self._attender = attender

    def __radd__(self, scores: torch.Tensor) -> _IndexerScores:
        assert self._attender.attention_mask is not None
        return _IndexerScores(scores, self._attender.attention_mask)


class _IndexerScores:
    """A proxy for masked scores, of which the indices of the highest are requested."""

    shape = (sys.maxsize,)

    def __init__(self, scores: torch.Tensor, attention_mask: torch.Tensor) -> None:
        self._scores, self._attention_mask = scores, attention_mask
        self._count = 0

    def topk(self, count: int, dim: int) -> _IndexerScores:
        assert dim == -1
        self._count = count
        return self

    @property
    def indices(self) -> _IndexerScores:
        return self

    def to(self, _: torch.dtype) -> torch.Tensor:
        chosen: torch.Tensor = ops.select_keys(self._scores, self._attention_mask, self._count)
        return chosen
