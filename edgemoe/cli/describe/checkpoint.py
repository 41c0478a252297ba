"""What a checkpoint holds, by its settings and the headers of its weight files. No torch.

Headers name every tensor with its shape, so experts are counted without building the model.
`--full` asks transformers besides: it knows what runs, headers know what is stored.
"""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from edgemoe.api.extras import needs
from edgemoe.errors import CheckpointError
from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from edgemoe.k_policy import KPolicy
    from edgemoe.models.config.ragged_note import RaggedNote

# Names under which configurations say how many experts there are, and how many a token uses.
_EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
)  # fmt: skip
_TOP_KS = (
    "num_experts_per_tok", "num_experts_per_token", "num_experts_per_topk", "moe_topk", "moe_k",
    "top_k_experts", "topk_experts",
)  # fmt: skip
_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "thinker_config")
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.(.*)")
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.(.*)")
# One tensor with all experts of a layer: granitemoe and gpt-oss name theirs so.
_STACK = re.compile(r"(?:^|\.)(?:experts|block_sparse_moe)\.(?!\d)(.*)")
_DOWN = re.compile(r"(?:^|\.)(?:down_proj|w2|output_linear|linear_2|fc2)(?:\.weight|$)")
# Parts that see and hear have layers too, but no experts, nor a place in these.
_LANGUAGE = re.compile(
    r"(?:^|\.)(?:language_model|text_model|llm)\.|^(?:model|backbone)\.layers\."
)
_HEADER_BYTES = 100 << 20  # the limit of safetensors itself

Tensors = dict[str, tuple[str, list[int]]]


def describe_checkpoint(path: Path, *, full: bool = False) -> dict[str, Any]:
    """Describe a checkpoint.

    Args:
        path: Its directory.
        full: Whether to build the model's structure, which imports torch and transformers.

    Returns:
        JSON values; `kind` comes first.

    Raises:
        CheckpointError: It is missing, unsafe or malformed; with `full`, also where its weights
            are not those of the model that config.json describes.
    """
    needs("export")
    from edgemoe.cli.describe.gguf import describe_gguf
    from edgemoe.cli.describe.quantised import plain_tensors
    from edgemoe.models.config.k_policy_file import read_k_policy
    from edgemoe.models.config.ragged_note import read_ragged_note
    from edgemoe.models.gguf.reading import open_gguf
    from edgemoe.models.quantised.notes import find_quantisation_note, reader_beside
    from edgemoe.models.safety import check_directory, check_weights, read_json_object

    check_directory(path)
    gguf = open_gguf(path)
    if gguf is not None:
        return describe_gguf(path, gguf, full=full)
    config = read_json_object(path / "config.json")
    weights = check_weights(path)
    tensors = read_headers(weights)
    text = text_config(config)
    quantised = find_quantisation_note(config, reader_beside(path))
    as_stored = tensors
    tensors, said = plain_tensors(tensors, quantised, config)
    facts: dict[str, Any] = {
        "kind": "dense checkpoint",
        "path": str(path),
        "family": config.get("model_type"),
        "parameters": sum(math.prod(shape) for _, shape in tensors.values()),
        "dtypes": sorted({dtype for dtype, _ in as_stored.values()}),
        "weight_bytes": sum(file.stat().st_size for file in weights),
        "layers": text.get("num_hidden_layers"),
        "hidden_size": text.get("hidden_size"),
        "vocab_size": text.get("vocab_size"),
        **said,
        **_left_out(tensors),
    }
    note, policy = read_ragged_note(path), read_k_policy(path)
    embedded = config.get("edgemoe")
    provenance = embedded.get("provenance") if isinstance(embedded, dict) else None
    if full:
        return {**facts, **_of_structure(path, note, policy, provenance)}
    counts, widths = count_experts(tensors)
    if not counts and note is None:
        if _first(text, _EXPERT_COUNTS):
            facts["kind"] = "MoE checkpoint whose experts have unknown names: see --full"
        return facts
    layers = sorted(counts) if note is None else list(note.moe_layers)
    experts = [counts[layer] for layer in layers] if note is None else note.experts_per_layer
    stored = [widths[layer] for layer in layers if layer in widths]
    told = note.widths_per_layer if note is not None and note.widths_per_layer else stored
    factored = note is not None and bool(note.ranks_per_layer or note.basis_per_layer)
    size = _first(text, ("moe_intermediate_size", "expert_hidden_dim", "intermediate_size"))
    return {
        **facts,
        "kind": "MoE checkpoint" if note is None else "ragged MoE checkpoint",
        "moe_layers": layers,
        "experts_per_layer": list(experts),
        "top_k": _top_k(text, layers),
        "expert_intermediate_size": size if factored or not told else max(told),
        **_describe_note(note, [] if factored and told is stored else told),
        **_describe_policy(policy),
        "provenance": provenance if note is None else note.provenance,
    }


def read_headers(files: Iterable[Path]) -> Tensors:
    """Read the headers of safetensors files.

    Args:
        files: The files.

    Returns:
        Dtype and shape of each tensor, by name.

    Raises:
        CheckpointError: A header is malformed.
    """
    found: Tensors = {}
    for file in files:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            try:
                header = parse_strict(opened.read(min(length, _HEADER_BYTES)))
                found |= {
                    name: (entry["dtype"], entry["shape"])
                    for name, entry in header.items()
                    if name != "__metadata__"
                }
            except (ValueError, TypeError, LookupError, AttributeError) as error:
                raise CheckpointError(
                    f"{file} must have a header of safetensors, got: {error}. Copy it again."
                ) from error
    return found


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a configuration that describes the language model."""
    for name in _TEXT_CONFIGS:
        inner = config.get(name)
        if isinstance(inner, dict):
            return {**config, **text_config(inner)}
    return config


def count_experts(tensors: Tensors) -> tuple[dict[int, int], dict[int, int]]:
    """Count the routed experts of each layer, and the width of one where the layout tells it.

    Args:
        tensors: Dtype and shape by name.

    Returns:
        Experts by decoder layer, and intermediate channels by decoder layer.
    """
    ids: dict[int, set[int]] = {}
    stacks: dict[int, set[int]] = {}
    widths: dict[int, int] = {}
    for name, (_, shape) in tensors.items():
        found = _LAYER.search(name)
        if found is None or "shared" in found[2]:
            continue
        layer, rest = int(found[1]), found[2]
        one, stack = _ONE_EXPERT.search(rest), _STACK.search(rest)
        if one is not None:
            ids.setdefault(layer, set()).add(int(one[1]))
            if len(shape) == 2 and _DOWN.search(one[2]):
                widths[layer] = max(shape[1], widths.get(layer, 0))
        elif stack is not None and len(shape) >= 3:
            stacks.setdefault(layer, set()).add(shape[0])
    counts = {layer: len(found) for layer, found in ids.items()}
    counts |= {layer: max(found) for layer, found in stacks.items() if layer not in counts}
    return counts, widths


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name)), None)


def _top_k(config: Mapping[str, Any], layers: Sequence[int]) -> list[int] | None:
    """Return the experts per token of each MoE layer, where config.json says them."""
    found = _first(config, _TOP_KS)
    if isinstance(found, list):  # one for each decoder layer
        return [found[layer] for layer in layers] if len(found) > max(layers) else None
    return [found] * len(layers) if isinstance(found, int) else None


def _of_structure(
    path: Path, note: RaggedNote | None, policy: KPolicy | None, provenance: object
) -> dict[str, Any]:
    from edgemoe.models.checkpoint import Checkpoint

    checkpoint = Checkpoint(path)
    if not checkpoint.has_experts:
        return {}
    shape = checkpoint.shape
    return {
        "kind": "MoE checkpoint" if note is None else "ragged MoE checkpoint",
        "moe_layers": [layer.layer for layer in shape.layers],
        "experts_per_layer": list(shape.experts_per_layer),
        "top_k": [layer.top_k for layer in shape.layers],
        "expert_intermediate_size": shape.intermediate_size,
        **_describe_note(note, shape.widths_per_layer),
        **_describe_policy(policy),
        "provenance": provenance if note is None else note.provenance,
        "left_out": [
            {"name": part.what, "tensors": part.tensors, "example": part.example}
            for part in checkpoint.left_out
        ],
        "dropped_settings": list(checkpoint.configuration.dropped),
    }


def _left_out(tensors: Tensors) -> dict[str, Any]:
    """Count what is no part of the language model, as far as names tell."""
    from edgemoe.models.weights.name_words import kind_by_name

    parts: dict[str, dict[str, Any]] = {}
    for name in tensors:
        kind = None if _LANGUAGE.search(name) else kind_by_name(name)
        if kind is not None:
            part = parts.setdefault(kind, {"name": kind, "tensors": 0, "example": name})
            part["tensors"] += 1
    return {"left_out": list(parts.values())} if parts else {}


def _describe_note(note: RaggedNote | None, widths: Sequence[int]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if len(set(widths)) > 1:
        found["widths_per_layer"] = list(widths)
    if note is None:
        return found
    if any(ranks is not None for ranks in note.ranks_per_layer or ()):
        pairs = note.ranks_per_layer or ()
        found["up_ranks"] = [None if ranks is None else ranks.up for ranks in pairs]
        found["down_ranks"] = [None if ranks is None else ranks.down for ranks in pairs]
    if note.basis_per_layer is not None:
        found["basis_per_layer"] = list(note.basis_per_layer)
    return found


def _describe_policy(policy: KPolicy | None) -> dict[str, Any]:
    return {} if policy is None else {"k_policy": policy.describe()}
