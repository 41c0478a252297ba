"""The optimisation profile: shapes that an engine accepts, and those it is tuned for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgemoe.errors import CompileError

if TYPE_CHECKING:
    from edgemoe_runtime.bundle.engine_cache import ShapeRange
    from edgemoe_runtime.bundle.graph_spec import TensorSpec
    from edgemoe_runtime.bundle.manifest import Manifest

# Context memory is reserved for the largest shapes: float32 logits of 256 tokens and a
# vocabulary of 49152 alone are 50 MB.
DEFAULT_MAX_BATCH = 1
DEFAULT_MAX_SEQUENCE = 256
DEFAULT_MAX_LENGTH = 2048

# Limit of TensorRT's TopK.
MOST_ORDERED = 3839

Profile = dict[str, "ShapeRange"]
"""Smallest, optimal and largest shape of each input with a dynamic dimension, and values of
each input that shapes depend on: trtexec writes both alike."""


@dataclass(frozen=True, kw_only=True)
class ShapeLimits:
    """The largest shapes that an engine must accept.

    Attributes:
        max_batch: Rows.
        max_sequence: New tokens in one call; a longer prompt is fed in pieces.
        max_length: Tokens of a row, past and new.
    """

    max_batch: int
    max_sequence: int
    max_length: int

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_sequence", "max_length"):
            if getattr(self, name) < 1:
                raise CompileError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if self.max_sequence > self.max_length:
            raise CompileError(
                f"max_sequence must be at most max_length {self.max_length}, got "
                f"{self.max_sequence}. Lower the one or raise the other."
            )


@dataclass(frozen=True, kw_only=True)
class _SizeRange:
    minimum: int
    optimum: int
    maximum: int


def choose_limits(
    manifest: Manifest,
    *,
    max_batch: int | None = None,
    max_sequence: int | None = None,
    max_length: int | None = None,
) -> ShapeLimits:
    """Return limits that fit the model, with defaults for what is None.

    Raises:
        CompileError: A limit is below 1 or beyond what the model can do.
    """
    longest = manifest.model.max_position_embeddings
    if max_length is not None and max_length > longest:
        raise CompileError(
            f"max_length must be at most the model's {longest} positions, got {max_length}."
        )
    length = min(DEFAULT_MAX_LENGTH, longest) if max_length is None else max_length
    sequence = min(DEFAULT_MAX_SEQUENCE, length) if max_sequence is None else max_sequence
    return ShapeLimits(
        max_batch=DEFAULT_MAX_BATCH if max_batch is None else max_batch,
        max_sequence=sequence,
        max_length=length,
    )


def make_profile(manifest: Manifest, limits: ShapeLimits) -> Profile:
    """Return the shapes of a bundle's graphs, tuned for generating one token after another.

    Prompts are accepted too, at whatever speed the kernels for single tokens give them;
    TensorRT-RTX makes kernels for the shapes that it meets.

    Args:
        manifest: The bundle's manifest; its inputs are those of every task.
        limits: The largest shapes.

    Returns:
        Shapes of each input that has a dynamic dimension, values of each that shapes depend on.

    Raises:
        CompileError: An input's dynamic dimension is not one that the interface has, or a call
            may have more tokens than TensorRT sorts.
    """
    batch = _SizeRange(minimum=1, optimum=1, maximum=limits.max_batch)
    sequence = _SizeRange(minimum=1, optimum=1, maximum=limits.max_sequence)
    past = _SizeRange(minimum=0, optimum=limits.max_length // 4, maximum=limits.max_length - 1)
    total = _SizeRange(
        minimum=past.minimum + sequence.minimum,
        optimum=past.optimum + sequence.optimum,
        maximum=limits.max_length,
    )
    named_sizes = {
        "input_ids": (batch, sequence),
        "position_ids": (batch, sequence),
        "attention_mask": (batch, total),
    }
    profile: Profile = {}
    for spec in manifest.inputs:
        if spec.sets_shapes:
            _check_order(limits)
            most = max(task.top_k for task in manifest.tasks.values())
            layers = int(spec.shape[0])
            profile[spec.name] = (1,) * layers, (most,) * layers, (most,) * layers
        if all(isinstance(size, int) for size in spec.shape):
            continue
        cached = spec.name.startswith("past_key_values.")
        # Of the cache, the dynamic dimension after the batch is its length.
        named = (batch, past, past) if cached else named_sizes.get(spec.name, ())
        profile[spec.name] = _shape_range(spec, named)
    return profile


def _check_order(limits: ShapeLimits) -> None:
    """Check that a call has no more tokens than TensorRT sorts, as dispatch to experts must."""
    tokens = limits.max_batch * limits.max_sequence
    if tokens > MOST_ORDERED:
        raise CompileError(
            f"max_batch times max_sequence must be at most {MOST_ORDERED}, which TensorRT puts "
            f"in order, got {tokens}. Lower one of them, or export with --static-shapes."
        )


def _shape_range(spec: TensorSpec, named: tuple[_SizeRange | None, ...]) -> ShapeRange:
    sizes = []
    for axis, size in enumerate(spec.shape):
        size_range = named[axis] if axis < len(named) else None
        if isinstance(size, int):
            sizes.append(_SizeRange(minimum=size, optimum=size, maximum=size))
        elif size_range is None:
            raise CompileError(
                f"dimension {axis} of input {spec.name} must have a fixed size, got {size!r}. "
                "Export the bundle again with this edgemoe."
            )
        else:
            sizes.append(size_range)
    return (
        tuple(size.minimum for size in sizes),
        tuple(size.optimum for size in sizes),
        tuple(size.maximum for size in sizes),
    )
