"""Rotary embeddings in a trace: as one op per head where they are of the usual kind.

Families rotate in several ways. The usual one, which rotates the two halves of each head,
becomes the op RotaryEmbedding, for which engines have kernels. Any other keeps its own
arithmetic, and only its cosines and sines become an op, Angles, which stays in float32 in
every precision. The kind is identified by probing the family's code.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import ExportError
from edgemoe_exporters.tracing import ops

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

# Rotary kinds whose angles depend on how long the text is.
_CHANGING_ROPE = frozenset({"dynamic", "longrope"})
_POSITIONS = torch.tensor([[0, 1, 2, 5, 11, 100]])
_LAYOUTS = ("halves", "pairs", "once")
_TOLERANCE = 1e-6
_APPLY = "apply_rotary_pos_emb"
_APPLY_COMPLEX = "apply_rotary_emb"


@dataclass(frozen=True)
class _Angles:
    """The computation of one rotary module, for one kind of layer.

    Attributes:
        frequencies: Name of the buffer: a trace replaces the tensor itself.
        scaling: Factor of cosines and sines.
        layout: Order of the angles, one of `_LAYOUTS`.
    """

    frequencies: str
    scaling: float
    layout: str


@dataclass
class RotaryUse:
    """The replacement of a model's rotary embeddings.

    Attributes:
        usual: Whether it is RotaryEmbedding.
        calls: How often it was called.
    """

    usual: bool
    calls: int = 0


def replace_rotary(stack: contextlib.ExitStack, model: Any, *, usual: bool) -> RotaryUse:
    """Replace a model's rotary embeddings by custom ops.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
        usual: Whether to try RotaryEmbedding; a family may have the usual code and use
            another, which shows when it is run.

    Returns:
        The replacement.

    Raises:
        ExportError: Angles depend on the length of the text, or are of an unknown kind.
    """
    modules = list(_rotary_modules(model))
    for module in modules:
        _check_static(module)
    modeling: Any = sys.modules[type(model).__module__]
    if usual and len(modules) == 1 and _is_usual(modules[0], modeling):
        use = RotaryUse(usual=True)
        _replace_usual(stack, modules[0], modeling, use)
        return use
    for module in modules:
        _replace_angles(stack, module)
    if hasattr(modeling, _APPLY_COMPLEX):
        _replace_complex(stack, modeling)
    return RotaryUse(usual=False)


def _rotary_modules(model: Any) -> Iterator[Any]:
    for module in model.modules():
        if type(module).__name__.endswith("RotaryEmbedding") and any(
            name.endswith("inv_freq") for name, _ in module.named_buffers(recurse=False)
        ):
            yield module


def _check_static(module: Any) -> None:
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for kind in kinds.values():
        if kind in _CHANGING_ROPE:
            raise ExportError(
                f"rope_type must not be one of {', '.join(sorted(_CHANGING_ROPE))}, got "
                f"{kind!r}: its angles change with the length of the text, which a graph "
                "cannot follow. Set another rope_type in config.json."
            )


def _with_values(module: nn.Module) -> Any:
    """Return the module, or one like it that has memory: angles are no weights."""
    if not any(buffer.is_meta for buffer in module.buffers()):
        return module
    build: Any = type(module)
    with torch.device("cpu"):
        return build(module.config)


@torch.no_grad()
def _run(module: Any, *kind: str) -> Any:
    forward: Any = type(module).forward
    return forward(module, torch.zeros(1, _POSITIONS.shape[1], 8), _POSITIONS, *kind)


def _identify(module: Any, *kind: str) -> _Angles:
    """Find the buffer, the factor and the order that give a module's output."""
    real = _with_values(module)
    output = _run(real, *kind)
    if isinstance(output, tuple):
        cos, sin = output
    else:
        cos, sin = output.real, output.imag
    scaling = float(cos[0, 0, 0])
    for name, buffer in real.named_buffers(recurse=False):
        for layout in _LAYOUTS:
            found = ops.angles(_POSITIONS, buffer.float(), scaling, layout)
            if all(
                ours.shape == theirs.shape and torch.allclose(ours, theirs, atol=_TOLERANCE)
                for ours, theirs in zip(found, (cos, sin), strict=True)
            ):
                return _Angles(name, scaling, layout)
    raise ExportError(
        f"the angles of {type(module).__name__} must be positions times frequencies, got "
        "others. This way of rotating is not supported."
    )


def _is_usual(module: Any, modeling: Any) -> bool:
    """Return whether halves are rotated, by angles that do not depend on the layer."""
    apply = getattr(modeling, _APPLY, None)
    frequencies = [name for name, _ in module.named_buffers(recurse=False)]
    if apply is None or not {"inv_freq"} <= set(frequencies):
        return False
    try:
        real = _with_values(module)
        cos, sin = _run(real)
        half = real.inv_freq.shape[0]
        draw = torch.Generator().manual_seed(0)
        query = torch.randn(1, 3, _POSITIONS.shape[1], 2 * half + 4, generator=draw)
        with torch.no_grad():
            found = apply(query, query, cos, sin)
    except Exception:  # another signature or another kind of output
        try:
            query = query[..., : 2 * half]
            with torch.no_grad():
                found = apply(query, query, cos, sin)
        except Exception:  # neither partly nor whole
            return False
    if not isinstance(found, tuple) or found[0].shape != query.shape:
        return False
    scaling = float(cos[0, 0, 0])
    expected = ops.rotary(query, _POSITIONS, real.inv_freq.float(), scaling)
    return all(torch.allclose(part, expected, atol=1e-5) for part in found)


def _replace_usual(
    stack: contextlib.ExitStack, embedding: Any, modeling: Any, use: RotaryUse
) -> None:
    """Pass positions and frequencies where cosine and sine were passed."""
    scaling = float(embedding.attention_scaling)

    def forward(
        _: torch.Tensor, position_ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _of_text(position_ids), embedding.inv_freq

    def apply(
        query: torch.Tensor,
        key: torch.Tensor,
        position_ids: torch.Tensor,
        inv_freq: torch.Tensor,
        *_: Any,
        unsqueeze_dim: int = 1,
        **__: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        use.calls += 1
        if unsqueeze_dim == 1:
            return (
                ops.rotary(query, position_ids, inv_freq, scaling),
                ops.rotary(key, position_ids, inv_freq, scaling),
            )
        # Heads come after the tokens here; the op has them before.
        rotated = [
            ops.rotary(states.transpose(1, 2), position_ids, inv_freq, scaling).transpose(1, 2)
            for states in (query, key)
        ]
        return rotated[0], rotated[1]

    embedding.forward = forward
    stack.callback(delattr, embedding, "forward")
    before = getattr(modeling, _APPLY)
    setattr(modeling, _APPLY, apply)
    stack.callback(setattr, modeling, _APPLY, before)


def _of_text(position_ids: torch.Tensor) -> torch.Tensor:
    """Return `[B, S]`: models of images too have positions of three kinds, equal for text."""
    return position_ids[0] if position_ids.dim() == 3 else position_ids


def _replace_angles(stack: contextlib.ExitStack, module: Any) -> None:
    known: dict[tuple[str, ...], _Angles] = {}

    def forward(
        states: torch.Tensor, position_ids: torch.Tensor, *kind: str, **named: str
    ) -> Any:
        kind = (*kind, *named.values())
        if kind not in known:
            known[kind] = _identify(module, *kind)
        how = known[kind]
        inv_freq = getattr(module, how.frequencies)
        positions = _of_text(position_ids)
        cos, sin = ops.angles(positions, inv_freq, how.scaling, how.layout)
        if how.layout == "once" and is_complex:
            # Real and imaginary parts side by side, for the function replaced below.
            return torch.stack([cos, sin], dim=-1)
        return cos.to(states.dtype), sin.to(states.dtype)

    is_complex = hasattr(sys.modules[type(module).__module__], _APPLY_COMPLEX)
    module.forward = forward
    stack.callback(delattr, module, "forward")


def _replace_complex(stack: contextlib.ExitStack, modeling: Any) -> None:
    """Multiply complex numbers as pairs of real ones: graphs have no others."""

    def rotate(states: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
        cos, sin = angles.unsqueeze(1).unbind(dim=-1)
        pairs = states.reshape(*states.shape[:-1], -1, 2)
        real, imaginary = pairs[..., 0], pairs[..., 1]
        rotated = [real * cos - imaginary * sin, real * sin + imaginary * cos]
        return torch.stack(rotated, dim=-1).flatten(-2)

    def apply(
        query: torch.Tensor, key: torch.Tensor, angles: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return rotate(query, angles), rotate(key, angles)

    before = getattr(modeling, _APPLY_COMPLEX)
    setattr(modeling, _APPLY_COMPLEX, apply)
    stack.callback(setattr, modeling, _APPLY_COMPLEX, before)
