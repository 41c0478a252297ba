"""Make a transformers model traceable: its routers, experts, attention, norms become ops."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from edgemoe.errors import ExportError
from edgemoe_exporters import ops

if TYPE_CHECKING:
    from collections.abc import Iterator

    from edgemoe.models.contract import MoeLayer, MoeModel

_ATTENTION = "edgemoe_trace"

# Rotary kinds whose angles do not depend on how long the text is.
_STATIC_ROPE = frozenset({"default", "linear", "llama3", "yarn"})


class _PassThroughCache(Cache):  # type: ignore[misc]  # transformers is untyped
    """Hands new keys and values on unchanged: joining them to the past is the op's work."""

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        super().__init__(layers=[])
        self.past = past
        self.present: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0


class TraceModule(nn.Module):
    """The model with flat tensors in and out, in the order of the graph's interface."""

    def __init__(self, model: MoeModel) -> None:
        super().__init__()
        self.lm = model.model
        self._cache: _PassThroughCache | None = None
        self._attention_mask: torch.Tensor | None = None
        self._k_cap: torch.Tensor | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[tuple[torch.Tensor, torch.Tensor]],
        k_cap: torch.Tensor,
    ) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Run the model.

        Args:
            input_ids: int64 ``[B, S]``.
            attention_mask: int64 ``[B, P + S]``.
            position_ids: int64 ``[B, S]``.
            past: Keys and values of each decoder layer, float ``[B, M, P, D]``.
            k_cap: Most experts per token for each MoE layer, int64 ``[L]``.

        Returns:
            Logits, float ``[B, S, vocabulary]``, and keys and values of past and new tokens.
        """
        self._cache = _PassThroughCache(past)
        self._attention_mask, self._k_cap = attention_mask, k_cap
        output = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
        )
        present = self._cache.present
        self._cache = self._attention_mask = self._k_cap = None
        return output.logits, present

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Answer transformers' attention interface with the op."""
        assert self._cache is not None
        assert self._attention_mask is not None
        window = sliding_window or getattr(module, "sliding_window", None) or 0
        past_key, past_value = self._cache.past[cast("int", module.layer_idx)]
        output, present_key, present_value = ops.attention(
            query,
            key,
            value,
            past_key,
            past_value,
            self._attention_mask,
            float(scaling),
            int(window),
        )
        self._cache.present.append((present_key, present_value))
        return output, None

    def route(
        self, layer: MoeLayer, position: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Answer for a router module: logits (which nobody reads), weights, ids."""
        assert self._k_cap is not None
        rule = layer.rule
        hidden = hidden.reshape(-1, hidden.shape[-1])
        weights, indices = ops.route(
            hidden,
            layer.router_weight,
            layer.correction_bias,
            self._k_cap,
            position,
            layer.top_k,
            rule.scoring,
            rule.renormalise,
            rule.scaling_factor,
            rule.n_group,
            rule.topk_group,
            rule.softmax_over,
        )
        return weights, weights, indices


# transformers keeps what it is registered for good, and must not keep a model with it.
_TRACED: list[TraceModule] = []


def _attend(*arguments: Any, **options: Any) -> tuple[torch.Tensor, None]:
    return _TRACED[-1].attend(*arguments, **options)


@contextlib.contextmanager
def prepared(model: MoeModel) -> Iterator[TraceModule]:
    """Yield the model with opaque ops inside; it is as before when the block ends.

    Args:
        model: The model to trace.

    Yields:
        A module that runs eagerly and can be traced.

    Raises:
        ExportError: The model's rotary embedding depends on the length of the text.
    """
    module = TraceModule(model)
    lm = model.model
    attention_before = lm.config._attn_implementation
    AttentionInterface.register(_ATTENTION, _attend)
    with contextlib.ExitStack() as stack:
        _TRACED.append(module)
        stack.callback(_TRACED.pop)
        lm.config._attn_implementation = _ATTENTION
        stack.callback(setattr, lm.config, "_attn_implementation", attention_before)
        for position, layer in enumerate(model.layers):
            _replace_moe(stack, module, layer, position)
        for child in lm.modules():
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                _replace_norm(stack, child)
        _replace_rotary(stack, lm)
        yield module


def _replace_moe(
    stack: contextlib.ExitStack, module: TraceModule, layer: MoeLayer, position: int
) -> None:
    def route(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return module.route(layer, position, hidden)

    def experts(
        hidden: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        output: torch.Tensor = ops.experts(
            hidden, indices, weights, layer.gate_up, layer.down, layer.activation
        )
        return output

    _replace_forward(stack, layer.router, route)
    _replace_forward(stack, layer.experts, experts)


def _replace_norm(stack: contextlib.ExitStack, norm: Any) -> None:
    def forward(states: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = ops.rms_norm(states, norm.weight, float(norm.variance_epsilon))
        return output

    _replace_forward(stack, norm, forward)


def _replace_rotary(stack: contextlib.ExitStack, lm: Any) -> None:
    """Let positions and frequencies travel where sine and cosine did."""
    modeling: Any = sys.modules[type(lm).__module__]
    embedding = lm.model.rotary_emb
    if embedding.rope_type not in _STATIC_ROPE:
        raise ExportError(
            f"rope_type must be one of {', '.join(sorted(_STATIC_ROPE))}, got "
            f"{embedding.rope_type!r}: its angles change with the length of the text, which a "
            "graph cannot follow. Set another rope_type in config.json."
        )
    scaling = float(embedding.attention_scaling)

    def forward(
        _: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return position_ids, embedding.inv_freq

    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        position_ids: torch.Tensor,
        inv_freq: torch.Tensor,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return (
            ops.rotary(query, position_ids, inv_freq, scaling),
            ops.rotary(key, position_ids, inv_freq, scaling),
        )

    _replace_forward(stack, embedding, forward)
    before = modeling.apply_rotary_pos_emb
    modeling.apply_rotary_pos_emb = apply
    stack.callback(setattr, modeling, "apply_rotary_pos_emb", before)


def _replace_forward(stack: contextlib.ExitStack, module: Any, forward: Any) -> None:
    module.forward = forward
    stack.callback(delattr, module, "forward")
