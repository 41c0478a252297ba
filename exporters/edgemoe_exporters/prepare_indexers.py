"""Sparse attention in a trace: which keys a token attends to is chosen by an op."""

from __future__ import annotations

import functools
import inspect
import sys
from typing import TYPE_CHECKING, Any

import torch

from edgemoe_exporters import ops

if TYPE_CHECKING:
    import contextlib

    from torch import nn

    from edgemoe_exporters.prepare_attention import Attender


def replace_indexers(stack: contextlib.ExitStack, model: nn.Module, attender: Attender) -> None:
    """Let indexers choose keys by the op SelectKeys.

    All of them mask their scores, take the places of the highest, and leave it to the attention
    interface to attend to those alone; here it gets what SelectKeys makes of the scores.

    Args:
        stack: Undoes it.
        model: The transformers model.
        attender: Knows the mask of the pass under way.
    """
    for module in model.modules():
        if not type(module).__name__.endswith("Indexer"):
            continue
        before = module.forward

        @functools.wraps(before)
        def forward(*arguments: Any, _before: Any = before, **options: Any) -> torch.Tensor:
            given = inspect.signature(_before).bind(*arguments, **options)
            given.arguments["attention_mask"] = _IndexerMask(attender)
            found: torch.Tensor = _before(*given.args, **given.kwargs)
            return found

        module.forward = forward
        stack.callback(delattr, module, "forward")


class _IndexerMask:
    """Stands for a mask that is added to scores."""

    dtype = torch.float32

    def __init__(self, attender: Attender) -> None:
        self._attender = attender

    def __radd__(self, scores: torch.Tensor) -> _IndexerScores:
        assert self._attender.attention_mask is not None
        return _IndexerScores(scores, self._attender.attention_mask)


class _IndexerScores:
    """Stands for masked scores, of which the places of the highest are asked."""

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
