"""Tiny random checkpoints in the wrappers in which families are published."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING

from edgemoe.models.loading import quiet_transformers
from edgemoe.models.registry import PUBLISHED_IN
from edgemoe.models.tiny import tiny_config

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# The class that a checkpoint of each is published with.
_CLASSES = {
    "aria": "AriaForConditionalGeneration",
    "dots3_note": "Dots3NoteForConditionalGeneration",
    "gemma4": "Gemma4ForConditionalGeneration",
    "hy_v4_vl": "HYV4VLForConditionalGeneration",
    "inkling2": "Inkling2ForConditionalGeneration",
    "inkling2_loop": "Inkling2LoopForConditionalGeneration",
    "inkling_mm_model": "InklingForConditionalGeneration",
    "internvl": "InternVLForConditionalGeneration",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "lfm2_vl": "Lfm2VlForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "minimax_m3_vl": "MiniMaxM3SparseForConditionalGeneration",
    "mistral3": "Mistral3ForConditionalGeneration",
    "nemotron_h_omni": "NemotronH_Omni_Reasoning_V3",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp": "Qwen4ExpForConditionalGeneration",
}
# The checkpoint's model type, its language model's, and the class.
WRAPPERS = {wrapper: (family, _CLASSES[wrapper]) for wrapper, family in PUBLISHED_IN.items()}

_SMALL: dict[str, Any] = {
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 64,
    "attention_heads": 2,
    "depth": 1,
    "downsample_hidden_size": 8,
    "head_dim": 16,
    "hidden_size": 32,
    "image_size": 16,
    "intermediate_size": 64,
    "mlp_layer_types": ["dense"],
    "n_layers": 4,
    "n_mel_bins": 16,
    "num_attention_heads": 2,
    "num_heads": 2,
    "num_hidden_layers": 1,
    "num_key_value_heads": 2,
    "num_position_embeddings": 16,
    "out_hidden_size": 64,
    "patch_size": 4,
    "projection_hidden_dim": 64,
    "text_hidden_size": 64,
    "vt_hidden_size": 32,
    "vt_intermediate_size": 64,
    "vt_num_attention_heads": 2,
    "vt_num_hidden_layers": 1,
}
# What refers to layers that a small part does not have.
_LARGE = ("per_layer_config", "pyramid_num_routed", "model_type")


def publish(wrapper: str, path: Path, **entries: Any) -> PreTrainedModel:
    """Write a tiny checkpoint as a producer would.

    Args:
        wrapper: One of `WRAPPERS`.
        path: The directory to write.
        **entries: Entries of config.json to set beside `text_config`.

    Returns:
        The whole model, in eval mode.
    """
    family, name = WRAPPERS[wrapper]
    configuration: Any = CONFIG_MAPPING[wrapper]
    parts = {
        part: _small(sub)
        for part, sub in vars(configuration()).items()
        if part in configuration.sub_configs and part != "text_config" and sub is not None
    }
    if "vision_config" not in parts:
        parts["vision_config"] = _small(configuration.sub_configs["vision_config"]())
    if wrapper == "nemotron_h_omni":
        parts["vision_config"]["video_temporal_patch_size"] = 2
    text = tiny_config(family).to_dict()
    config = configuration(text_config=text, **parts, **entries)
    for entry in ("projector_hidden_size", "merged_hidden_size", "projection_hidden_size"):
        if hasattr(config, entry):
            setattr(config, entry, 64)
    folder = configuration.__module__.replace("configuration_", "modeling_")
    torch.manual_seed(0)
    model: Any = getattr(importlib.import_module(folder), name)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and parameter.std() == 0:
                parameter.add_(0.1 * torch.randn_like(parameter))
    with quiet_transformers():
        model.save_pretrained(path)
    whole: PreTrainedModel = model
    return whole


def _small(part: Any) -> dict[str, Any]:
    known = {name: value for name, value in part.to_dict().items() if name not in _LARGE}
    sizes = {name: value for name, value in _SMALL.items() if name in known}
    found: dict[str, Any] = type(part)(**{**known, **sizes}).to_dict()
    return found
