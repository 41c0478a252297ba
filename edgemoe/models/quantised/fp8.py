"""FP8 as DeepSeek-V3 and its likes announce it, and as ModelOpt does. No torch."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from edgemoe.models.quantised.form import Form, UnreadableFormError, check_entries
from edgemoe.models.quantised.scaled import find_scaled
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Mapping

_TYPES = {"e4m3": "F8_E4M3", "e5m2": "F8_E5M2"}
_ENTRIES = {
    "activation_scheme", "dequantize", "fmt", "modules_to_not_convert", "quant_method",
    "scale_fmt", "weight_block_size",
}  # fmt: skip
_MODELOPT_ENTRIES = {
    "config_groups", "exclude_modules", "ignore", "kv_cache_quant_algo", "kv_cache_scheme",
    "producer", "quant_algo", "quant_method",
}  # fmt: skip
_MODELOPT_SPANS = {"FP8": "tensor", "FP8_PER_CHANNEL_PER_TOKEN": "channel"}


def fp8(settings: Mapping[str, Any], where: str) -> Form:
    """Read an announcement of transformers' method `fp8`.

    Args:
        settings: What is announced.
        where: Where, for messages.

    Returns:
        The form.

    Raises:
        UnreadableFormError: It says something that is not known.
    """
    check_entries(settings, _ENTRIES, where)
    kind = settings.get("fmt") or "e4m3"
    if kind not in _TYPES:
        raise UnreadableFormError(f"{where} with fmt {clip(str(kind))}")
    # Values of scales that are powers of two are stored as any other.
    if settings.get("scale_fmt") not in (None, "float", "ue8m0"):
        raise UnreadableFormError(f"{where} with scale_fmt {clip(str(settings['scale_fmt']))}")
    block = settings.get("weight_block_size")
    if block is None:
        return Form(
            says=f"fp8 {kind} with scales by tensor or channel",
            find=partial(
                find_scaled,
                stored=_TYPES[kind],
                suffixes=("_scale_inv", "_scale"),
                spans=("channel", "tensor"),
            ),
        )
    high, wide = block_sides(block, f"{where} with weight_block_size")
    return Form(
        says=f"fp8 {kind} with block scales {high}x{wide}",
        find=partial(
            find_scaled,
            stored=_TYPES[kind],
            suffixes=("_scale_inv",),
            spans=("block",),
            block=(high, wide),
        ),
    )


def block_sides(block: object, where: str) -> tuple[int, int]:
    """Return rows and columns of a block.

    Args:
        block: What is announced.
        where: Where, for messages.

    Returns:
        The numbers.

    Raises:
        UnreadableFormError: It is not two whole numbers.
    """
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(side) is not int or side < 1 for side in block)
    ):
        raise UnreadableFormError(f"{where} {clip(str(block))}")
    return block[0], block[1]


def modelopt(settings: Mapping[str, Any], where: str) -> Form:
    """Read an announcement of NVIDIA's ModelOpt.

    Args:
        settings: What is announced.
        where: Where, for messages.

    Returns:
        The form.

    Raises:
        UnreadableFormError: It is another form than FP8 by tensor or row, or says something
            that is not known.
    """
    algorithm = settings.get("quant_algo")
    if not isinstance(algorithm, str) or algorithm not in _MODELOPT_SPANS:
        raise UnreadableFormError(f"{where} with quant_algo {clip(str(algorithm))}")
    check_entries(settings, _MODELOPT_ENTRIES, where)
    span = _MODELOPT_SPANS[algorithm]
    return Form(
        says=f"fp8 e4m3 with scales by {span} (ModelOpt)",
        find=partial(find_scaled, stored="F8_E4M3", suffixes=("_scale",), spans=(span,)),
    )
