"""Hold carved layers in a Mixture-of-Experts checkpoint that stock transformers loads.

The family is `glm4_moe`: sigmoid scores, no renormalisation, and a correction bias that
takes part in the choice only. An expert's gate then depends on the token and on that expert
alone, so gates survive the removal of other experts and any change of k; a softmax over all
experts would rescale the rest.

The dense layer is the sum of all its channels with weight one, so gates must be near one:
`gate = 2 * sigmoid(slope * r(x))` for router scores `r` of unit deviation. Float32 cannot
give both extremes: gates within `d` of one leave scores apart by less than about
`6e-8 / d` tied, and engines break ties differently. Where experts are chosen the slope is
`GATE_SLOPE` (gates within about one percent of one, near ties as rare as rounding); where
every expert is used nothing is chosen, and `EXACT_GATE_SLOPE` makes the carved model the
dense one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import CarveError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch
    from transformers import PreTrainedModel

    from edgemoe.carve.channels import NeuronAssignment
    from edgemoe.carve.router import LinearRouter

GATE_SLOPE = 2.0**-6
EXACT_GATE_SLOPE = 2.0**-15


@dataclass(frozen=True, kw_only=True)
class CarvedLayer:
    """One carved feed-forward layer.

    Attributes:
        assignment: Where each channel goes.
        router: Which experts a token gets.
    """

    assignment: NeuronAssignment
    router: LinearRouter


def build_moe(
    dense: PreTrainedModel, layers: Sequence[CarvedLayer], *, top_k: int
) -> PreTrainedModel:
    """Assemble the MoE model from a dense one and its carved layers.

    Args:
        dense: Dense decoder of a family in `DENSE_FAMILIES`; it is not changed.
        layers: One per decoder layer, all of one shape.
        top_k: Experts per token, in `[1, experts]`.

    Returns:
        A `Glm4MoeForCausalLM` in float32, in eval mode.

    Raises:
        CarveError: `top_k` is out of range, the shared channels are not a multiple of the
            expert size, or `check_dense` refuses the model.
    """
    import torch
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    check_dense(dense.config)
    experts, size = layers[0].assignment.experts.shape
    shared = layers[0].assignment.shared.size
    check_shape(experts=experts, expert_size=size, shared_size=shared, top_k=top_k)
    config = Glm4MoeConfig(**_settings(dense.config, experts, size, shared, top_k))
    model = Glm4MoeForCausalLM(config)
    slope = EXACT_GATE_SLOPE if top_k == experts else GATE_SLOPE
    source = dense.state_dict()
    target = {name: source[name] for name in source if ".mlp." not in name}
    for index, layer in enumerate(layers):
        prefix = f"model.layers.{index}.mlp"
        gate = source[f"{prefix}.gate_proj.weight"]
        up = source[f"{prefix}.up_proj.weight"]
        down = source[f"{prefix}.down_proj.weight"]
        neurons = torch.from_numpy(layer.assignment.experts)
        kept = torch.from_numpy(layer.assignment.shared)
        target[f"{prefix}.experts.gate_up_proj"] = torch.cat(
            [gate[neurons], up[neurons]], dim=1
        )
        target[f"{prefix}.experts.down_proj"] = down[:, neurons].permute(1, 0, 2)
        if shared:
            target[f"{prefix}.shared_experts.gate_proj.weight"] = gate[kept]
            target[f"{prefix}.shared_experts.up_proj.weight"] = up[kept]
            target[f"{prefix}.shared_experts.down_proj.weight"] = down[:, kept]
        weight = torch.from_numpy(layer.router.weight)
        bias = torch.from_numpy(layer.router.bias)
        target[f"{prefix}.gate.weight"] = weight * slope
        # sigmoid(z) is 1/2 + z/4 for small z, and the correction bias is added behind it.
        target[f"{prefix}.gate.e_score_correction_bias"] = bias * (slope / 4)
    target = {name: tensor.to(torch.float32).contiguous() for name, tensor in target.items()}
    model.load_state_dict(target, strict=True)
    model.generation_config = dense.generation_config
    return model.eval()


def carved_types(stored: Mapping[str, torch.dtype]) -> dict[str, torch.dtype]:
    """Return the types to write what carving moves and does not change.

    Args:
        stored: Floating types of the dense checkpoint's tensors, by name.

    Returns:
        Types of the carved model's tensors, by name; routers, which are new, are not among
        them.
    """
    types = {name: dtype for name, dtype in stored.items() if ".mlp." not in name}
    for name, dtype in stored.items():
        prefix, found, part = name.partition(".mlp.")
        if found:
            types[f"{prefix}.mlp.shared_experts.{part}"] = dtype
        if part == "down_proj.weight":
            types[f"{prefix}.mlp.experts.down_proj"] = dtype
        if part == "gate_proj.weight" and stored.get(f"{prefix}.mlp.up_proj.weight") == dtype:
            types[f"{prefix}.mlp.experts.gate_up_proj"] = dtype
    return types


def check_dense(config: Any) -> None:
    """Refuse dense models that the carved family cannot hold without a change.

    Args:
        config: Configuration of a family in `DENSE_FAMILIES`.

    Raises:
        CarveError: Attention looks through a sliding window, the activation is not silu, or
            a projection has a bias that the carved family has no place for.
    """
    window = getattr(config, "sliding_window", None)
    if window is not None and getattr(config, "use_sliding_window", True):
        raise CarveError(
            f"attention must be full, got a sliding window of {window} tokens. "
            "Carve a checkpoint without one."
        )
    if config.hidden_act != "silu":
        raise CarveError(
            f"the activation must be silu, got {config.hidden_act}. Carve a SwiGLU checkpoint."
        )
    # Only q, k and v have a bias in the carved family, as in qwen2.
    for name in ("mlp_bias", "attention_bias"):
        if getattr(config, name, False):
            raise CarveError(
                f"feed-forward and output projections must have no bias, got {name}. Carve a "
                "checkpoint without."
            )


def check_shape(*, experts: int, expert_size: int, shared_size: int, top_k: int) -> None:
    """Refuse shapes that the carved family cannot hold.

    Args:
        experts: Experts per layer.
        expert_size: Intermediate channels per expert.
        shared_size: Shared channels.
        top_k: Experts per token.

    Raises:
        CarveError: `top_k` is out of range, or the shared channels are not a positive
            multiple of the expert size.
    """
    if not 1 <= top_k <= experts:
        raise CarveError(
            f"--top-k must be between 1 and the {experts} experts, got {top_k}. "
            "Choose fewer experts per token."
        )
    if shared_size < expert_size or shared_size % expert_size:
        raise CarveError(
            f"shared neurons must be a positive multiple of the expert size, got {shared_size} "
            f"shared neurons, experts of {expert_size}. Change --shared-fraction or --experts."
        )


def _settings(config: Any, experts: int, size: int, shared: int, top_k: int) -> dict[str, Any]:
    rope = dict(config.rope_parameters)
    rope["partial_rotary_factor"] = 1.0
    head_dim = getattr(config, "head_dim", None)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": head_dim or config.hidden_size // config.num_attention_heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": rope,
        "attention_bias": config.model_type == "qwen2",
        "use_qk_norm": config.model_type == "qwen3",
        "moe_intermediate_size": int(size),
        "num_experts_per_tok": top_k,
        "n_shared_experts": int(shared // size),
        "n_routed_experts": int(experts),
        "routed_scaling_factor": 2.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "num_mtp_layers": 0,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "dtype": "float32",
    }


def neuron_shares(
    intermediate_size: int, *, experts: int, shared_fraction: float
) -> tuple[int, int]:
    """Divide a feed-forward layer into shared channels and experts of one size.

    Args:
        intermediate_size: Intermediate channels of the dense layer.
        experts: Experts to carve.
        shared_fraction: Wanted share of the channels that every token uses, in `(0, 1)`.

    Returns:
        `(shared_size, expert_size)`: exact divisions, the shared size nearest to the wish.

    Raises:
        CarveError: No division exists: shared channels must be a multiple of the expert size.
    """
    sizes = [
        (intermediate_size - experts * size, size)
        for size in range(1, intermediate_size // (experts + 1) + 1)
        if (intermediate_size - experts * size) % size == 0
    ]
    if not sizes:
        raise CarveError(
            f"{intermediate_size} neurons cannot be divided into {experts} experts and shared "
            "experts of the same size. Choose another --experts."
        )
    wish = shared_fraction * intermediate_size
    return min(sizes, key=lambda pair: (abs(pair[0] - wish), -pair[1]))
