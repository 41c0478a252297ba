"""GPTQ and AWQ: whole numbers of 4 or 8 bits, packed along one side. No torch.

GPTQ packs `qweight` [in x bits / 32, out] along the inputs, AWQ `qweight` [in, out x bits / 32]
along the outputs, in an order of its own; `qzeros` [groups, out x bits / 32] and `scales`
[groups, out] are alike. GPTQ's first version stores zero points less one. Sources: AutoGPTQ,
GPTQModel and AutoAWQ.
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
from edgemoe.models.quantised.scaled import FLOATS
from edgemoe_runtime.messages import clip

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from edgemoe.models.quantised.form import Headers

_WORD_BITS = 32
# How it was computed and what may run it: neither changes what is stored.
_OF_MAKING = {
    "backend", "batch_size", "block_name_to_quantize", "cache_block_outputs", "damp_percent",
    "dataset", "do_fuse", "exllama_config", "fuse_max_seq_len", "max_input_length", "meta",
    "model_file_base_name", "model_name_or_path", "model_seqlen",
    "modules_in_block_to_quantize",
    "modules_to_fuse", "modules_to_not_convert", "module_name_preceding_first_block",
    "pad_token_id", "quant_method", "static_groups", "tokenizer", "true_sequential",
    "use_cuda_fp16", "use_exllama", "dynamic", "damp_auto_increment", "lm_head", "mse",
}  # fmt: skip
_GPTQ_ENTRIES = {
    "bits", "checkpoint_format", "desc_act", "format", "group_size", "is_marlin_format",
    "pack_dtype", "sym", *_OF_MAKING,
}  # fmt: skip
_AWQ_ENTRIES = {"bits", "group_size", "version", "zero_point", *_OF_MAKING}
_AWQ_OTHER_NAMES = {"w_bit": "bits", "q_group_size": "group_size"}


def gptq(settings: Mapping[str, Any], where: str) -> Form:
    """Read an announcement of GPTQ, versions 1 and 2 of its format.

    Args:
        settings: What is announced.
        where: Where, for messages.

    Returns:
        The form.

    Raises:
        UnreadableFormError: It is a form for one engine, or says something that is not known.
    """
    check_entries(settings, _GPTQ_ENTRIES, where)
    bits = _bits(settings, where, (4, 8))
    group = _group(settings, where)
    kind = settings.get("checkpoint_format") or settings.get("format") or "gptq"
    if kind not in ("gptq", "gptq_v2") or settings.get("is_marlin_format"):
        raise UnreadableFormError(f"{where} with checkpoint_format {clip(str(kind))}")
    if settings.get("pack_dtype") not in (None, "int32"):
        raise UnreadableFormError(
            f"{where} with pack_dtype {clip(str(settings['pack_dtype']))}"
        )
    ordered = bool(settings.get("desc_act"))
    find = partial(_find_gptq, bits=bits, group=group, ordered=ordered, less_one=kind == "gptq")
    return Form(says=f"int{bits} of {kind}{_in_groups(group)}", find=find)


def awq(settings: Mapping[str, Any], where: str) -> Form:
    """Read an announcement of AWQ, in the order of its `gemm` kernels.

    Args:
        settings: What is announced.
        where: Where, for messages.

    Returns:
        The form.

    Raises:
        UnreadableFormError: It is another order, or says something that is not known.
    """
    found = {_AWQ_OTHER_NAMES.get(name, name): value for name, value in settings.items()}
    check_entries(found, _AWQ_ENTRIES, where)
    version = found.get("version") or "gemm"
    if str(version).lower() != "gemm":
        raise UnreadableFormError(f"{where} with version {clip(str(version))}")
    bits = _bits(found, where, (4,))
    group = _group(found, where)
    has_zeros = found.get("zero_point", True) is not False
    find = partial(_find_awq, bits=bits, group=group, has_zeros=has_zeros)
    return Form(says=f"int{bits} of awq gemm{_in_groups(group)}", find=find)


def _bits(settings: Mapping[str, Any], where: str, known: tuple[int, ...]) -> int:
    bits = whole_number(settings, "bits", where)
    if bits not in known:
        raise UnreadableFormError(f"{where} with {bits} bits")
    return bits


def _group(settings: Mapping[str, Any], where: str) -> int | None:
    """Return the inputs that share a scale; None for all of them."""
    if settings.get("group_size") == -1:
        return None
    return whole_number(settings, "group_size", where)


def _in_groups(group: int | None) -> str:
    return "" if group is None else f" in groups of {group}"


def _find_gptq(
    headers: Headers, bits: int, group: int | None, ordered: bool, less_one: bool
) -> Iterator[Piece]:
    per_word = _WORD_BITS // bits
    for name, stem, words in _qweights(headers):
        inputs, outputs = words[0] * per_word, words[1]
        parts = _parts(headers, name, stem, inputs, outputs, group, per_word)
        order = f"{stem}g_idx"
        if ordered or order in headers:
            parts["order"] = need(headers, order, name, ("I32", "I64"), ((inputs,),))
        yield Piece(
            target=f"{stem}weight",
            shape=(outputs, inputs),
            rule="gptq",
            parts=parts,
            settings={"bits": bits, "group": group or inputs, "less_one": less_one},
        )


def _find_awq(
    headers: Headers, bits: int, group: int | None, has_zeros: bool
) -> Iterator[Piece]:
    per_word = _WORD_BITS // bits
    for name, stem, words in _qweights(headers):
        inputs, outputs = words[0], words[1] * per_word
        parts = _parts(headers, name, stem, inputs, outputs, group, per_word)
        if not has_zeros:
            raise UnreadableFormError(f"{parts['zeros']}, where zero_point is false")
        yield Piece(
            target=f"{stem}weight",
            shape=(outputs, inputs),
            rule="awq",
            parts=parts,
            settings={"group": group or inputs},
        )


def _qweights(headers: Headers) -> Iterator[tuple[str, str, list[int]]]:
    for name, (dtype, shape) in headers.items():
        if name.endswith(".qweight"):
            if dtype != "I32" or len(shape) != 2:
                raise UnreadableFormError(f"{name} of type {dtype} and shape {shape}")
            yield name, name.removesuffix("qweight"), shape


def _parts(
    headers: Headers,
    name: str,
    stem: str,
    inputs: int,
    outputs: int,
    group: int | None,
    per_word: int,
) -> dict[str, str]:
    groups = -(-inputs // (group or inputs))
    words = -(-outputs // per_word)
    return {
        "weight": name,
        "scale": need(headers, f"{stem}scales", name, FLOATS, ((groups, outputs),)),
        "zeros": need(headers, f"{stem}qzeros", name, ("I32",), ((groups, words),)),
    }
