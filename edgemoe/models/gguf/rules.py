"""Which stored tensors make which tensor of a Hugging Face checkpoint, and how."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    Build: TypeAlias = "Callable[[list[torch.Tensor], Sizes], torch.Tensor]"


LAYER = re.compile(r"blk\.(\d+)\.(.+)")


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What tensors are put together with.

    Attributes:
        heads: Query heads.
        kv_heads: Key and value heads.
    """

    heads: int
    kv_heads: int


def alone(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Take the only tensor as it is."""
    return parts[0]


def query_heads(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Undo llama.cpp's order of a query's rotated pairs."""
    return _pairs_apart(parts[0], sizes.heads)


def key_heads(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Undo llama.cpp's order of a key's rotated pairs."""
    return _pairs_apart(parts[0], sizes.kv_heads)


def _pairs_apart(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    # [heads, pairs, 2, ...] there, [heads, 2, pairs, ...] here.
    apart = tensor.reshape(heads, -1, 2, *tensor.shape[1:]).transpose(1, 2)
    return apart.reshape(tensor.shape)


def as_row(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Give a vector `[hidden]` its first dimension back: `[1, hidden]`."""
    return parts[0].reshape(1, -1)


def joined(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Stack gate upon up: `[..., 2 * intermediate, hidden]`."""
    import torch

    return torch.cat(parts, dim=-2)


def first_half(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Take the gate of a stack of gate upon up."""
    return parts[0][: parts[0].shape[0] // 2]


def second_half(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Take the up projection of a stack of gate upon up."""
    return parts[0][parts[0].shape[0] // 2 :]


def alternating(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Alternate columns of gate and up: `[experts, hidden, 2 * intermediate]` (gpt-oss)."""
    return alternating_bias(parts, sizes).transpose(1, 2)


def alternating_bias(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Alternate biases of gate and up: `[experts, 2 * intermediate]` (gpt-oss)."""
    import torch

    return torch.stack(parts, dim=2).flatten(1, 2)


def turned(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Transpose each expert."""
    return parts[0].transpose(-1, -2)


def latent(parts: list[torch.Tensor], sizes: Sizes) -> torch.Tensor:
    """Put the split up projection of latent attention together again.

    Args:
        parts: `[heads, rank, nope]` and `[heads, value, rank]`.
        sizes: Not used.

    Returns:
        `[heads * (nope + value), rank]`.
    """
    import torch

    keys, values = parts
    return torch.cat([keys.transpose(1, 2), values], dim=1).flatten(0, 1)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """One tensor of a decoder layer.

    Attributes:
        target: Its name in the layer; `{expert}` stands for the number of an expert.
        sources: Names of the stored tensors in their layer, in the order that `build` wants;
            with `{expert}` where each expert has its own.
        build: Makes the tensor of them.
    """

    target: str
    sources: tuple[str, ...]
    build: Build = alone

    @property
    def is_each(self) -> bool:
        """Whether each expert gets a tensor."""
        return "{expert}" in self.target


def both(target: str, source: str, build: Build = alone) -> tuple[Rule, ...]:
    """Make the rules of a weight and of a bias of the same name.

    Args:
        target: The module.
        source: Its name in GGUF.
        build: Makes the tensors.

    Returns:
        Two rules; a file has what it has.
    """
    return tuple(
        Rule(target=f"{target}.{kind}", sources=(f"{source}.{kind}",), build=build)
        for kind in ("weight", "bias")
    )


def attention(*, paired: bool) -> tuple[Rule, ...]:
    """Make the rules of plain attention and of the norms around it.

    Args:
        paired: Whether llama.cpp keeps rotated pairs side by side.

    Returns:
        The rules.
    """
    return (
        *both("input_layernorm", "attn_norm"),
        *both("self_attn.q_proj", "attn_q", query_heads if paired else alone),
        *both("self_attn.k_proj", "attn_k", key_heads if paired else alone),
        *both("self_attn.v_proj", "attn_v"),
        *both("self_attn.o_proj", "attn_output"),
        *both("self_attn.q_norm", "attn_q_norm"),
        *both("self_attn.k_norm", "attn_k_norm"),
    )


def is_unused(name: str, layers: int) -> bool:
    """Return whether llama.cpp and the model compute without a tensor of a layer.

    Args:
        name: Its name in the file.
        layers: Decoder layers that the model has: those behind predict later tokens.

    Returns:
        Whether it is left out.
    """
    match = LAYER.fullmatch(name)
    # The first files held a table of positions that is computed anew.
    return match is not None and (int(match[1]) >= layers or match[2] == "attn_rot_embd.weight")


AFTER_ATTENTION = both("post_attention_layernorm", "ffn_norm")
DENSE = tuple(
    rule for part in ("gate", "up", "down") for rule in both(f"mlp.{part}_proj", f"ffn_{part}")
)


def each_expert(module: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Make the rules of experts that a checkpoint keeps one by one.

    Args:
        module: Where the experts are in a layer.
        gate: Name of the gate projection there.
        up: Name of the up projection there.
        down: Name of the down projection there.

    Returns:
        Rules for stacks of gate and up apart and in one, and for experts apart.
    """

    def one(name: str, source: str, build: Build = alone) -> Rule:
        target = f"{module}.{{expert}}.{name}.weight"
        return Rule(target=target, sources=(f"{source}.weight",), build=build)

    return (
        *(
            one(name, f"ffn_{part}_exps")
            for name, part in ((gate, "gate"), (up, "up"), (down, "down"))
        ),
        one(gate, "ffn_gate_up_exps", first_half),
        one(up, "ffn_gate_up_exps", second_half),
        # Until 2024 each expert was a tensor of its own.
        *(
            one(name, f"ffn_{part}.{{expert}}")
            for name, part in ((gate, "gate"), (up, "up"), (down, "down"))
        ),
    )


def shared_expert(module: str) -> tuple[Rule, ...]:
    """Make the rules of experts that each token uses.

    Args:
        module: Where they are in a layer.

    Returns:
        The rules.
    """
    return tuple(
        Rule(target=f"{module}.{part}_proj.weight", sources=(f"ffn_{part}_shexp.weight",))
        for part in ("gate", "up", "down")
    )


def choice_bias(target: str, build: Build = alone) -> Rule:
    """Make the rule of the bias that experts are chosen with.

    Args:
        target: Its name in a layer.
        build: Makes the tensor.

    Returns:
        The rule.
    """
    return Rule(target=target, sources=("exp_probs_b.bias",), build=build)
