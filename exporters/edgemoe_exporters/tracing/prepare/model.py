"""Make a transformers model traceable: routers, experts, attention, norms become custom ops."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import EdgemoeError, ExportError
from edgemoe.models.adapter import adapt_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.decoder import cache_name
from edgemoe.models.discovery import build_skeleton
from edgemoe.models.k_policy import following
from edgemoe.models.registry import FAMILIES
from edgemoe.models.transformers_internals import (
    attention_implementation,
    set_attention_implementation,
)
from edgemoe_exporters.precision import PRECISIONS
from edgemoe_exporters.tracing import ops
from edgemoe_exporters.tracing.cache import CacheTensor, TraceCache
from edgemoe_exporters.tracing.prepare.attention import ACTIVE, ATTENTION, Attender, register
from edgemoe_exporters.tracing.prepare.compressed import replace_compressed
from edgemoe_exporters.tracing.prepare.convolved import replace_convolved
from edgemoe_exporters.tracing.prepare.indexers import replace_indexers
from edgemoe_exporters.tracing.prepare.moe import replace_moe
from edgemoe_exporters.tracing.prepare.norms import replace_norms
from edgemoe_exporters.tracing.prepare.recurrence import replace_recurrence
from edgemoe_exporters.tracing.prepare.rotary import replace_rotary
from edgemoe_exporters.tracing.prepare.sets import order_sets

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer


# Families whose layers cache tensors that no custom op takes, or whose router or activation is
# of a kind that graphs do not have.
WITHOUT_GRAPH = frozenset(
    {
        "qwen4_exp_text",
    }
)
_WITH_GRAPH = ", ".join(name for name in FAMILIES if name not in WITHOUT_GRAPH)
_NOT_YET = (
    "Calibration, pruning and evaluation work for this family, graphs do not yet; families "
    f"with graphs: {_WITH_GRAPH}."
)


class TraceModule(nn.Module):
    """The model with flat tensors in and out, in the order of the graph's interface.

    Attributes:
        lm: The transformers model.
        cached: The tensors that decoder layers cache, in the order of the graph's inputs.
        longest_window: Positions of the longest window that layers compress; 0 for none.
    """

    def __init__(self, model: MoeModel) -> None:
        super().__init__()
        self.lm = model.model
        self.cached: tuple[CacheTensor, ...] = ()
        self.attender = Attender()
        self._cache_name = cache_name(self.lm)
        self._moe_layers = len(model.layers)
        self.longest_window = 0
        self._k_cap: torch.Tensor | None = None
        self._ids: torch.Tensor | None = None

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
        k_cap: torch.Tensor,
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Run the model.

        Args:
            input_ids: int64 `[B, S]`.
            attention_mask: int64 `[B, P + S]`.
            position_ids: int64 `[B, S]`.
            past: The cached tensors, in the order of `cached`.
            k_cap: Most experts per token for each MoE layer, int64 `[L]`.

        Returns:
            Logits, float `[B, S, vocabulary]`, and the tensors to cache.
        """
        given = {tensor.name: part for tensor, part in zip(self.cached, past, strict=True)}
        joined = self.attender.joined if self.cached else frozenset()
        cache = TraceCache(given, joined, attention_mask.shape[1])
        self.attender.cache, self.attender.attention_mask = cache, attention_mask
        self._k_cap, self._ids = k_cap, input_ids
        output = self.lm(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=True,
            **{self._cache_name: cache},
        )
        present = cache.present(self.cached)
        self.attender.attention_mask = self._k_cap = self._ids = None
        return output.logits, present

    def dry_run(self) -> None:
        """Find the tensors that each layer caches, by a pass over two tokens.

        Raises:
            ExportError: The model does something that a graph cannot.
        """
        config: Any = self.lm.config
        device = next(self.lm.parameters()).device
        ids = torch.zeros(1, 2, dtype=torch.int64, device=device)
        positions = torch.arange(2, device=device)[None]
        caps = torch.ones(self._moe_layers, dtype=torch.int64, device=device)
        try:
            with torch.no_grad():
                self(ids, torch.ones_like(ids), positions, [], caps)
        except EdgemoeError:
            raise
        except Exception as error:  # whatever the family's code raises where it needs a state
            kinds = ", ".join(sorted(set(getattr(config, "layer_types", None) or ())))
            raise ExportError(
                f"layers of {config.model_type} must keep keys and values, states of "
                "convolutions or of linear attention, or keys of an indexer, to be put into a "
                f"graph, got code that asks for something else (layers: "
                f"{kinds or 'of one kind'}). {_NOT_YET}"
            ) from error
        assert self.attender.cache is not None
        self.cached = self.attender.cache.tensors()
        self.attender.cache = None

    def route(
        self, layer: MoeLayer, position: int, hidden: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Compute the outputs of a router module.

        Args:
            layer: Whose router it is.
            position: Of the layer among MoE layers.
            hidden: float `[..., hidden]`.

        Returns:
            Logits (which are not read), weights and ids; then the weights of experts that every
            token uses, where the rule has them.
        """
        assert self._k_cap is not None
        rule, roles = layer.rule or layer.by_id, layer.spec.routing.tensors
        assert rule is not None
        assert roles is not None
        chosen: torch.Tensor | None = None
        if roles.table is not None:
            assert self._ids is not None
            chosen = layer.tensor(roles.table)[self._ids.reshape(-1)]
        weights, indices = ops.route(
            hidden.reshape(-1, hidden.shape[-1]),
            layer.tensor(roles.weight),
            *(
                None if name is None else layer.tensor(name)
                for name in (roles.logit_bias, roles.correction_bias, roles.expert_scale)
            ),
            chosen,
            self._k_cap,
            position,
            layer.top_k,
            rule.scoring,
            rule.softmax_over,
            rule.renormalise,
            rule.sum_epsilon,
            rule.scaling_factor,
            rule.bias_on,
            rule.n_group,
            rule.topk_group,
            rule.group_score,
            rule.group_fill,
            rule.jitter,
            rule.idle,
            rule.shared,
        )
        if not rule.shared:
            return weights, weights, indices
        gates = ops.shared_gates(
            hidden.reshape(-1, hidden.shape[-1]),
            layer.tensor(roles.weight),
            weights,
            rule.shared,
            rule.scaling_factor,
        )
        if roles.gate_scale is not None:
            # The other gates are scaled behind the experts.
            gates = gates * layer.tensor(roles.gate_scale)
        return weights, weights, indices, gates


@contextlib.contextmanager
def prepared(model: MoeModel) -> Iterator[TraceModule]:
    """Yield the model with custom ops inside; it is as before when the block ends.

    Args:
        model: The model to trace; on the meta device its shapes are checked at no cost.

    Yields:
        A module that runs eagerly and can be traced.

    Raises:
        ExportError: A router, an activation or a layer's state has no op.
    """
    for layer in model.layers:
        check_layer(layer, model.family)
    module = TraceModule(model)
    lm = model.model
    attention_before = attention_implementation(lm.config)
    register()
    with contextlib.ExitStack() as stack:
        # A policy is bound to each task's graph, after the trace.
        stack.enter_context(following(model, None))
        ACTIVE.append(module.attender)
        stack.callback(ACTIVE.pop)
        set_attention_implementation(lm.config, ATTENTION)
        stack.callback(set_attention_implementation, lm.config, attention_before)
        order_sets(stack, lm)
        for position, layer in enumerate(model.layers):
            replace_moe(stack, module, layer, position)
        replace_norms(stack, lm)
        replace_recurrence(stack, lm, module.attender)
        replace_convolved(stack, lm, module.attender)
        module.longest_window = replace_compressed(stack, lm, module.attender)
        replace_indexers(stack, lm, module.attender)
        if not _dry_run_usual(stack, module):
            replace_rotary(stack, lm, usual=False)
            module.dry_run()
        yield module


def _dry_run_usual(stack: contextlib.ExitStack, module: TraceModule) -> bool:
    """Try RotaryEmbedding; return whether the model runs with it, and uses it."""
    with contextlib.ExitStack() as attempt:
        use = replace_rotary(attempt, module.lm, usual=True)
        if not use.usual:
            return False
        with contextlib.suppress(ExportError):
            module.dry_run()
            if use.calls:
                stack.push(attempt.pop_all())
                return True
    return False


def check_exportable(path: Path | Checkpoint, precision: str) -> None:
    """Check that a graph can hold a checkpoint; its weights are not read.

    Args:
        path: The checkpoint.
        precision: The graph's.

    Raises:
        ExportError: A router, an activation or a layer's state has no op, or experts have no
            op of that precision.
        CheckpointError: The checkpoint's configuration is malformed.
    """
    checkpoint = Checkpoint.open(path)
    model = adapt_model(build_skeleton(checkpoint.family, checkpoint.config))
    with prepared(model):
        pass
    note = checkpoint.note
    if precision in {"int8", "int4"} and note is not None and note.ranks_per_layer is not None:
        raise ExportError(
            f"experts must be whole to be exported in {precision}, got factored ones, for "
            "which onnxruntime has no quantised op. Export with --precision fp32 or fp16."
        )
    block = PRECISIONS[precision].block if precision in {"int8", "int4"} else 1
    for rank in () if note is None else note.basis_per_layer or ():
        if rank is not None and rank % block:
            raise ExportError(
                f"bases that experts share must have a rank that is a multiple of {block} to "
                f"be exported in {precision}, got {rank}: {block} weights share a "
                "scale. Export with --precision fp32 or fp16, or choose such a rank."
            )
    for layer in model.layers:
        activation = layer.activation
        if precision in {"int8", "int4"} and activation and not activation.is_swiglu:
            raise ExportError(
                f"experts must have SwiGLU to be exported in {precision}, got the activation "
                f"{activation.kind}: onnxruntime has no quantised op for it. Export with "
                "--precision fp32 or fp16."
            )


def check_layer(layer: MoeLayer, family: str) -> None:
    """Check that a layer's router and activation have a custom op.

    Args:
        layer: The layer.
        family: The model's.

    Raises:
        ExportError: Its router or its activation is of no known kind.
    """
    is_known = layer.rule is not None or layer.by_id is not None
    unknown = "activation of experts" if is_known else "router"
    if not is_known or layer.activation is None:
        raise ExportError(
            f"the {unknown} of {family} must be of a kind that graphs know, got another in "
            f"layer {layer.index}. {_NOT_YET}"
        )
