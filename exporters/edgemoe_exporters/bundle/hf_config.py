"""Write a bundle's config.json: the checkpoint's, in terms that optimum understands.

optimum-onnx 0.1.0 makes the first, empty cache itself, from config.json and not from the graph.
For a `model_type` that it has no rule for, it takes every query head for a key head and
`hidden_size / num_attention_heads` for the size of a head. Where a model differs, config.json
has `"model_type": "gpt_oss"`, the type of Mixture-of-Experts models whose
`num_key_value_heads` and `head_dim` optimum reads; nothing else of that type is used. The
model's own type is then under `edgemoe`. The runtime reads manifest.json alone.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from edgemoe_runtime.input_files import parse_strict

if TYPE_CHECKING:
    from pathlib import Path

UNDERSTOOD_TYPE = "gpt_oss"


def write_config(content: bytes, target: Path) -> None:
    """Write a bundle's config.json.

    Args:
        content: The checkpoint's config.json.
        target: The bundle's.
    """
    text = content.decode("utf-8").replace("\r\n", "\n")
    config = parse_strict(text, infinities=True)
    adapted = adapt_config(config)
    if adapted != config:
        text = json.dumps(adapted, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    target.write_text(text, encoding="utf-8")


def adapt_config(config: dict[str, Any]) -> dict[str, Any]:
    """Describe a model's cache in terms that optimum understands.

    Args:
        config: Content of a checkpoint's config.json.

    Returns:
        The same, or with another `model_type` and with `head_dim` and
        `num_key_value_heads`.
    """
    heads = config.get("num_attention_heads")
    hidden = config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return config
    key_heads = config.get("num_key_value_heads") or heads
    size = config.get("head_dim") or hidden // heads
    if (key_heads, size) == (heads, hidden // heads):
        return config
    note = config.get("edgemoe")
    return {
        **config,
        "model_type": UNDERSTOOD_TYPE,
        "num_key_value_heads": key_heads,
        "head_dim": size,
        # Absent, that type would take a default of its own, and warn about it.
        "rope_scaling": config.get("rope_scaling"),
        "edgemoe": {
            **(note if isinstance(note, dict) else {}),
            "model_type": config.get("model_type"),
        },
    }
