"""Rotary positions as GGUF describes them, in transformers' words.

llama.cpp writes Llama 3's scaling as one divisor for each frequency (`rope_freqs.weight`),
LongRoPE as two such tensors, and the others as keys `rope.scaling.*`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.decoding import read_values

if TYPE_CHECKING:
    import numpy.typing as npt

    from edgemoe.models.gguf.metadata import Metadata

FREQUENCIES = "rope_freqs.weight"
LONG, SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (FREQUENCIES, LONG, SHORT)
# Llama 3.1 to 3.3 name the same two bounds; the third number follows from the divisors.
_LOW, _HIGH = 1.0, 4.0
_RTOL = 4e-7
_DEFAULT_BASE = 10000.0


def rope_parameters(metadata: Metadata, size: int) -> dict[str, Any]:
    """Read how a model turns positions.

    Args:
        metadata: The file's keys; those of `rope.` are taken.
        size: Dimensions of a head that are turned.

    Returns:
        `rope_parameters` of config.json.

    Raises:
        CheckpointError: The file describes what transformers cannot say.
    """
    base = metadata.take("rope.freq_base", float, _DEFAULT_BASE)
    found: dict[str, Any] = {"rope_theta": base, "rope_type": "default"}
    # Without a type, llama.cpp takes a factor for linear scaling.
    kind = metadata.take("rope.scaling.type", str, "linear")
    old = metadata.take("rope.scale_linear", float, 0.0)
    factor = metadata.take("rope.scaling.factor", float, old)
    original = metadata.take("rope.scaling.original_context_length", int, None)
    attention = metadata.take("rope.scaling.attn_factor", float, 1.0)
    blocks = metadata.container.blocks
    if FREQUENCIES in blocks and (LONG in blocks or SHORT in blocks):
        metadata.refuse(f"{metadata.container.architecture}.rope.scaling.type")
    if FREQUENCIES in blocks:
        if kind not in ("none", "linear") or factor not in (0.0, 1.0):
            metadata.refuse(f"{metadata.container.architecture}.rope.scaling.type", ("none",))
        scaled = _from_divisors(_divisors(metadata, FREQUENCIES, size), base, size)
        if scaled.get("rope_type") == "longrope":
            scaled["original_max_position_embeddings"] = metadata.take("context_length", int)
        found |= scaled
    elif LONG in blocks and SHORT in blocks:
        length = metadata.take("context_length", int)
        found |= {
            "rope_type": "longrope",
            "long_factor": _divisors(metadata, LONG, size).tolist(),
            "short_factor": _divisors(metadata, SHORT, size).tolist(),
            "original_max_position_embeddings": original or length,
            "factor": length / (original or length),
            "attention_factor": attention,
        }
        return found
    elif kind == "linear" and factor not in (0.0, 1.0):
        found |= {"rope_type": "linear", "factor": factor}
    elif kind == "yarn":
        found |= _yarn(metadata, factor, original, attention)
        return found
    elif kind not in ("none", "linear") and not (kind == "longrope" and factor in (0.0, 1.0)):
        metadata.refuse(
            f"{metadata.container.architecture}.rope.scaling.type",
            ("none", "linear", "yarn", "longrope with its tensors"),
        )
    if attention != 1.0:
        metadata.refuse(f"{metadata.container.architecture}.rope.scaling.attn_factor", (1.0,))
    return found


def _yarn(
    metadata: Metadata, factor: float, original: int | None, attention: float
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor or 1.0,
        "original_max_position_embeddings": original or metadata.take("context_length", int),
    }
    for key, name in (("beta_fast", "beta_fast"), ("beta_slow", "beta_slow")):
        value = metadata.take(f"rope.scaling.yarn_{key}", float, None)
        if value is not None:
            found[name] = value
    own = metadata.take("rope.scaling.yarn_attn_factor", float, None)
    if own is not None or attention != 1.0:
        found["attention_factor"] = attention * (
            0.1 * math.log(max(factor, 1.0)) + 1.0 if own is None else own
        )
    multiplier = metadata.take("rope.scaling.yarn_log_multiplier", float, 0.0)
    if multiplier:
        if metadata.container.architecture != "deepseek2":
            metadata.refuse(
                f"{metadata.container.architecture}.rope.scaling.yarn_log_multiplier", (0.0,)
            )
        # llama.cpp keeps a tenth of mscale_all_dim, and takes mscale for the same.
        whole = float(str(np.float32(multiplier * 10.0)))
        found |= {"mscale": whole, "mscale_all_dim": whole}
    return found


def _divisors(metadata: Metadata, name: str, size: int) -> npt.NDArray[np.float32]:
    block = metadata.container.blocks[name]
    if math.prod(block.shape) != size // 2:
        metadata.refuse_tensor(block, f"of {size // 2} values, one for each frequency")
    if block.type_name != "F32":
        metadata.refuse_tensor(block, "of type F32")
    found: npt.NDArray[np.float32] = read_values(block).reshape(-1)
    if not np.isfinite(found).all() or (found <= 0).any():
        raise CheckpointError(
            f"{name} must hold numbers above 0, got {found.min()} to {found.max()} in "
            f"{metadata.container.path}. Download the file again."
        )
    return found


def _from_divisors(divisors: npt.NDArray[np.float32], base: float, size: int) -> dict[str, Any]:
    """Say divisors of frequencies as Llama 3's rule where they follow it, else one by one."""
    whole = np.round(divisors)
    # Divisions in float32 leave a last digit behind.
    divisors = np.where(np.isclose(divisors, whole, rtol=_RTOL, atol=0), whole, divisors)
    if (divisors == 1.0).all():
        return {}
    factor = float(str(np.float32(divisors.max())))
    wavelengths = 2 * math.pi * base ** (np.arange(0, size, 2) / size)
    between = (divisors > 1.0) & (divisors < divisors.max() * (1 - _RTOL))
    if between.any():
        # The blend is linear in the inverse wavelength: each value in between tells the length.
        blend = (1 / divisors[between] - 1 / factor) / (1 - 1 / factor)
        lengths = wavelengths[between] * (blend * (_HIGH - _LOW) + _LOW)
        length = float(np.median(lengths))
    else:
        kept = wavelengths[divisors == 1.0]
        length = float(kept.max() * _HIGH * 1.01) if kept.size else float(wavelengths[0] / 2)
    length = float(round(length)) if abs(length - round(length)) < 1e-3 * length else length
    ramp = np.clip((length / wavelengths - _LOW) / (_HIGH - _LOW), 0.0, 1.0)
    if np.allclose((1 - ramp) / factor + ramp, 1 / divisors, rtol=_RTOL, atol=0):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": _LOW,
            "high_freq_factor": _HIGH,
            "original_max_position_embeddings": int(length)
            if length == int(length)
            else length,
        }
    return {
        "rope_type": "longrope",
        "long_factor": divisors.tolist(),
        "short_factor": divisors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
    }
