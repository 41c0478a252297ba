"""Entries of a written config.json: transformers' own, and what others look for.

transformers 5 writes one spelling of its own (`num_local_experts`, `rope_parameters`, `dtype`),
and only what differs from a default. Other programs know the spellings under which families
are published: mlx-lm 0.32 refuses a Qwen3-MoE without `num_experts`, and where `rope_theta` is
missing it takes a default of its own, in silence. So a source's own entries stay, with the
values that hold for what is written.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedConfig

# They tell of the source's files, not of the model.
_OF_THE_FILES = {
    "_name_or_path",
    "_commit_hash",
    "architectures",
    "compression_config",
    "dtype",
    "edgemoe",
    "model_type",
    "quantization",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
}
_PLAIN = (bool, int, float, str, list, type(None))
_ROPE_NAMES = {"rope_theta", "partial_rotary_factor"}
# How programs spell the number of routed experts; a family's class knows one or two of them.
_EXPERT_COUNTS = {
    "moe_num_experts",
    "n_experts",
    "n_routed_experts",
    "num_experts",
    "num_local_experts",
    "num_routed_experts",
}
# How families spell the number of layers that predict further tokens: `num_mtp_layers`,
# `mtp_num_hidden_layers`, `num_mtp_modules`, `num_nextn_predict_layers`, `use_mtp`.
_PREDICTING = re.compile(r"(mtp|nextn|next_n)_(\w*_)?(layers|modules)$|^use_mtp$")


def complete_entries(
    written: dict[str, Any],
    config: PreTrainedConfig,
    source: Mapping[str, Any],
    count_entries: Sequence[str] = (),
) -> None:
    """Add the spellings of a source, and those of families, to what transformers writes.

    Layers that predict further tokens are counted as none: they are never written.

    Args:
        written: What transformers wrote, with its `dtype`; it is added to.
        config: The configuration that it was written from.
        source: Entries of the config.json that the model was read from; those of the language
            model where that is a part; empty where there is none.
        count_entries: Entries of the configuration that say how many experts a layer has.
    """
    for name, value in source.items():
        if name not in _OF_THE_FILES and name not in written:
            written[name] = _value(config, name, value)
    _count_experts(written, config, source, count_entries)
    aliases: Mapping[str, str] = getattr(config, "attribute_map", None) or {}
    for alias, name in aliases.items():
        if "expert" in alias and name in written:
            written.setdefault(alias, written[name])
    # A rotary base that is the same for all layers has a name of its own everywhere else.
    rope = written.get("rope_parameters")
    if isinstance(rope, dict):
        for name in _ROPE_NAMES.intersection(rope):
            written.setdefault(name, rope[name])
        if rope.get("rope_type") == "default":
            written.setdefault("rope_scaling", None)
    # Defaults of a class count too, and transformers writes only what differs from them.
    for name, held in {**vars(config), **written}.items():
        if _PREDICTING.search(name) and isinstance(held, int) and held:
            written[name] = type(held)(0)
    written["torch_dtype"] = written["dtype"]


def _value(config: PreTrainedConfig, name: str, value: Any) -> Any:
    """Return what an entry of the source says of what is written."""
    if not isinstance(value, _PLAIN):
        return value
    # Other spellings of transformers' own names are attributes too, and follow a pruning.
    held = getattr(config, name, value)
    return held if isinstance(held, _PLAIN) else value


def _count_experts(
    written: dict[str, Any],
    config: PreTrainedConfig,
    source: Mapping[str, Any],
    count_entries: Sequence[str],
) -> None:
    """Make spellings agree that the family's class does not know and so does not change."""
    aliases: Mapping[str, str] = getattr(config, "attribute_map", None) or {}
    for entry in count_entries:
        known = {entry, *(alias for alias, name in aliases.items() if name == entry)}
        before = next((source[name] for name in known if name in source), None)
        for name in _EXPERT_COUNTS.difference(known).intersection(source):
            count, told = getattr(config, entry), source[name]
            if before is not None and told == before:
                written[name] = count
            elif isinstance(told, list) and set(map(repr, told)) == {repr(before)}:
                written[name] = [count] * len(told)
