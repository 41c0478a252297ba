"""What a GGUF checkpoint holds, by its header. No torch."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.gguf.reading import GgufModel

_STACKS = ("ffn_down_exps.weight", "ffn_down.0.weight")


def describe_gguf(path: Path, model: GgufModel, *, full: bool) -> dict[str, Any]:
    """Describe a GGUF model.

    Args:
        path: The file, or the folder that it lies in.
        model: The same, open.
        full: Whether to read its checkpoint's structure, which imports torch and transformers.

    Returns:
        JSON values; `kind` comes first.

    Raises:
        CheckpointError: With `full`, its tensors are not those of the model that it describes.
    """
    config = model.config
    blocks = model.container.blocks
    parameters = sum(math.prod(block.shape) for block in blocks.values())
    stored = sum(model.stored_bytes.values())
    experts = _experts(model)
    facts: dict[str, Any] = {
        "kind": "MoE checkpoint" if experts else "dense checkpoint",
        "path": str(path),
        "format": f"GGUF, architecture {model.container.architecture}",
        "family": config["model_type"],
        "parameters": parameters,
        "dtypes": sorted(model.stored_bytes),
        "stored": [
            f"{name} {size / stored:.1%}"
            for name, size in sorted(model.stored_bytes.items(), key=lambda item: -item[1])
        ],
        "bits_per_weight": round(8 * stored / parameters, 3),
        "weight_bytes": stored,
        "layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "vocab_size": config["vocab_size"],
        "rope": config["rope_parameters"]["rope_type"],
        "left_out": list(model.left_out),
    }
    if experts:
        facts |= {
            "moe_layers": sorted(experts),
            "experts_per_layer": [experts[layer] for layer in sorted(experts)],
            "top_k": [config["num_experts_per_tok"]] * len(experts),
            "expert_intermediate_size": config.get(
                "moe_intermediate_size", config["intermediate_size"]
            ),
        }
    if full and experts:
        from edgemoe.models.checkpoint import Checkpoint

        Checkpoint(path).check_left_out()
    return facts


def _experts(model: GgufModel) -> dict[int, int]:
    """Count the experts of each layer."""
    found: dict[int, int] = {}
    for layer in range(model.config["num_hidden_layers"]):
        for name in _STACKS:
            block = model.container.blocks.get(f"blk.{layer}.{name}")
            if block is not None:
                stacked = len(block.shape) == 3
                found[layer] = block.shape[0] if stacked else model.config["num_local_experts"]
    return found
