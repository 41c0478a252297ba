"""The entries of config.json that every architecture has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.rope import rope_parameters

if TYPE_CHECKING:
    from edgemoe.models.gguf.architectures import Architecture
    from edgemoe.models.gguf.metadata import Metadata

_COMMON = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
}


def read_config(metadata: Metadata, architecture: Architecture) -> dict[str, Any]:
    """Read the configuration of a model, but for what its tensors say.

    Args:
        metadata: The file's keys.
        architecture: How the file is read.

    Returns:
        Entries of config.json.

    Raises:
        CheckpointError: A key is missing, or says what the family does not compute with.
    """
    found: dict[str, Any] = {entry: metadata.take(key, int) for key, entry in _COMMON.items()}
    heads = found["num_attention_heads"]
    if min(found.values()) < 1:
        raise CheckpointError(
            f"{metadata.container.path} must say sizes above 0, got {found}. Download it again."
        )
    layers = metadata.take("block_count", int)
    predicted = metadata.take("nextn_predict_layers", int, 0)
    size = metadata.take("attention.key_length", int, found["hidden_size"] // heads)
    found |= {
        "model_type": architecture.model_type,
        # Layers that predict later tokens are counted by llama.cpp, not by transformers.
        "num_hidden_layers": layers - predicted,
        "intermediate_size": metadata.take("feed_forward_length", int, 0),
        "num_key_value_heads": metadata.take("attention.head_count_kv", int, heads),
        "rms_norm_eps": _epsilon(metadata),
    }
    turned = metadata.take("rope.dimension_count", int, size)
    own = architecture.read(metadata)
    if "kv_lora_rank" not in own:
        metadata.expect("attention.value_length", size)
        if architecture.rotary == "all":
            metadata.expect("rope.dimension_count", size)
    if architecture.head_dim is not None:
        found[architecture.head_dim] = size
    elif "kv_lora_rank" not in own:
        metadata.expect("attention.key_length", found["hidden_size"] // heads)
    rope = rope_parameters(metadata, turned)
    if architecture.rotary == "some":
        rope["partial_rotary_factor"] = turned / size
    if architecture.model_type == "gpt_oss" and rope["rope_type"] == "yarn":
        # The family does not round the bounds of the ramp; no key says so.
        rope["truncate"] = False
    if architecture.model_type == "phimoe" and rope["rope_type"] == "longrope":
        rope |= dict.fromkeys(("short_mscale", "long_mscale"), rope["attention_factor"])
    return {**found, "rope_parameters": rope, **own}


def _epsilon(metadata: Metadata) -> float:
    other = metadata.take("attention.layer_norm_epsilon", float, None)
    if other is None:
        return metadata.take("attention.layer_norm_rms_epsilon", float)
    found = metadata.take("attention.layer_norm_rms_epsilon", float, other)
    if found != other:
        metadata.refuse(f"{metadata.container.architecture}.attention.layer_norm_epsilon")
    return found
