"""What compressed-tensors writes: packed whole numbers, int8 and FP8 with scales. No torch.

Layout of packed ones: `X_packed` [rows, words] holds the numbers of a row from the lowest bits
of each word on, plus half their range; `X_scale` [rows, groups]; `X_zero_point` packed along
the rows; `X_shape`. Source: compressed-tensors 0.20.1.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from edgemoe.models.quantised.form import (
    Form,
    Piece,
    UnreadableFormError,
    check_entries,
    need,
    whole_number,
)
from edgemoe.models.quantised.fp8 import block_sides
from edgemoe.models.quantised.scaled import FLOATS, find_scaled
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgemoe.models.quantised.form import Headers

_WORD_BITS = 32
_ENTRIES = {
    "config_groups", "format", "global_compression_ratio", "ignore", "ignored_layers",
    "kv_cache_scheme", "quant_method", "quantization_status", "run_compressed",
    "sparsity_config", "version",
}  # fmt: skip
_GROUP_ENTRIES = {"format", "input_activations", "output_activations", "targets", "weights"}
_WEIGHT_ENTRIES = {
    "actorder", "block_structure", "dynamic", "group_size", "num_bits", "observer",
    "observer_kwargs", "scale_dtype", "strategy", "symmetric", "type", "zp_dtype",
}  # fmt: skip
# What the numbers of a weight depend on.
_MATTERS = ("block_structure", "group_size", "num_bits", "strategy", "symmetric", "type")
_PLAIN_FORMATS = {"float-quantized", "int-quantized", "naive-quantized"}
_PACKED = "pack-quantized"


def compressed(settings: Mapping[str, Any], where: str) -> Form:
    """Read an announcement of compressed-tensors.

    Args:
        settings: What is announced.
        where: Where, for messages.

    Returns:
        The form.

    Raises:
        UnreadableFormError: Its format is another one, differs between layers, prunes or
            rotates besides, or says something that is not known.
    """
    check_entries(settings, _ENTRIES, where)
    kind = settings.get("format")
    if kind != _PACKED and kind not in _PLAIN_FORMATS:
        raise UnreadableFormError(f"{where} with format {clip(str(kind))}")
    if settings.get("quantization_status") not in (None, "compressed"):
        status = clip(str(settings["quantization_status"]))
        raise UnreadableFormError(f"{where} with quantization_status {status}")
    pruned = settings.get("sparsity_config") or {}
    if not isinstance(pruned, dict) or pruned.get("format", "dense") != "dense":
        raise UnreadableFormError(f"{where} with a sparsity_config")
    weights = _weights(settings, str(kind), where)
    bits = whole_number(weights, "num_bits", where)
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "tensor")
    if strategy not in ("tensor", "channel", "group", "block"):
        raise UnreadableFormError(f"{where} with strategy {clip(str(strategy))}")
    group = whole_number(weights, "group_size", where) if strategy == "group" else None
    block = None
    if strategy == "block":
        block = block_sides(weights.get("block_structure"), f"{where} with block_structure")
    symmetric = weights.get("symmetric", True) is not False
    span = {"group": f"groups of {group}", "block": f"blocks {block and block[0]}x"}
    by = f"{span['block']}{block[1]}" if block else span.get(strategy, strategy)
    number = weights.get("type", "int")
    if kind == _PACKED:
        if number != "int" or bits not in (4, 8) or strategy not in ("channel", "group"):
            raise UnreadableFormError(f"{where} with {bits} bits of {number} by {strategy}")
        find = partial(_find_packed, bits=bits, group=group, with_zeros=not symmetric)
        return Form(says=f"int{bits} of compressed-tensors with scales by {by}", find=find)
    if bits != 8 or number not in ("int", "float"):
        raise UnreadableFormError(f"{where} with {bits} bits of {clip(str(number))}")
    name = "int8" if number == "int" else "fp8 e4m3"
    return Form(
        says=f"{name} of compressed-tensors with scales by {by}",
        find=partial(
            find_scaled,
            stored="I8" if number == "int" else "F8_E4M3",
            suffixes=("_scale",),
            spans=(strategy,),
            block=block,
            group=group,
            with_zeros=not symmetric,
            in_scale_type=True,
        ),
    )


def _weights(settings: Mapping[str, Any], kind: str, where: str) -> Mapping[str, Any]:
    """Return how weights are quantised, the same for all that are."""
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UnreadableFormError(f"{where} without config_groups")
    found: list[Mapping[str, Any]] = []
    for group in groups.values():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            raise UnreadableFormError(f"{where} with a group without weights")
        check_entries(group, _GROUP_ENTRIES, where)
        check_entries(weights, _WEIGHT_ENTRIES, where)
        if group.get("format") not in (None, kind):
            raise UnreadableFormError(f"{where} with format {clip(str(group['format']))}")
        found.append(weights)
    kinds = [[one.get(name) for name in _MATTERS] for one in found]
    if any(kind != kinds[0] for kind in kinds):
        raise UnreadableFormError(f"{where} with groups that are quantised differently")
    return found[0]


def _find_packed(
    headers: Headers, bits: int, group: int | None, with_zeros: bool
) -> Iterator[Piece]:
    per_word = _WORD_BITS // bits
    for name, (dtype, shape) in headers.items():
        if not name.endswith(".weight_packed"):
            continue
        target = name.removesuffix("_packed")
        if dtype != "I32" or len(shape) != 2:
            raise UnreadableFormError(f"{name} of type {dtype} and shape {shape}")
        rows, words = shape
        columns = _columns(headers, f"{target}_scale", words * per_word, per_word, group)
        groups = 1 if group is None else -(-columns // group)
        parts = {
            "weight": name,
            "scale": need(headers, f"{target}_scale", name, FLOATS, ((rows, groups),)),
            "shape": need(headers, f"{target}_shape", name, ("I64", "I32"), ((2,),)),
        }
        if with_zeros:
            packed = (-(-rows // per_word), groups)
            parts["zeros"] = need(headers, f"{target}_zero_point", name, ("I32",), (packed,))
        yield Piece(
            target=target,
            shape=(rows, columns),
            rule="packed_rows",
            parts=parts,
            settings={"bits": bits, "group": group or columns, "shape": [rows, columns]},
        )


def _columns(headers: Headers, scale: str, most: int, per_word: int, group: int | None) -> int:
    """Return the columns of a row whose last word may not be full, as its groups tell."""
    if group is None or scale not in headers or len(headers[scale][1]) != 2:
        return most
    told = headers[scale][1][1] * group
    return told if most - per_word < told <= most else most
