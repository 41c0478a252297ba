"""Families of language models with experts: found in transformers, not listed by hand.

Every family whose experts keep the contract (`edgemoe.models.experts`) is opened the same
way; `edgemoe.models.discovery` finds out how each of its layers is built. The families
below are those that the support table (docs/families.md) was made for.
"""

from __future__ import annotations

import difflib
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import FamilyError
from edgemoe.models.experts import is_experts_class
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# model_type in config.json, in transformers 5.24. Those of vision-language models stand for
# their language part.
FAMILIES: tuple[str, ...] = (
    "afmoe", "aria_text", "axk1", "axk2", "bailing_hybrid", "beam", "cohere2_moe",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "dots1", "dots3_note_text",
    "ernie4_5_moe", "exaone_moe", "flex_olmo", "flint", "gemma4_text", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "gpt_oss", "granitemoe", "granitemoe_swa",
    "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3", "hy_v4",
    "hy_v4_vl_text", "inkling2_loop_text", "inkling2_text", "inkling_text", "jamba",
    "kimi_linear", "kolibri1", "laguna", "lara_mini", "lfm2_moe",
    "mellum", "mimo_v2_flash", "minimax", "minimax_m2", "minimax_m3_vl_text", "mistral4",
    "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_5_moe_text", "qwen3_moe",
    "qwen3_next", "qwen4_exp_text", "solar_open", "zaya",
)  # fmt: skip

# The model_type of checkpoints that hold a family and parts that see or hear, as they are
# published, and the family; the tests read each of them.
PUBLISHED_IN: dict[str, str] = {
    "aria": "aria_text",
    "dots3_note": "dots3_note_text",
    "gemma4": "gemma4_text",
    "hy_v4_vl": "hy_v4_vl_text",
    "inkling2": "inkling2_text",
    "inkling2_loop": "inkling2_loop_text",
    "inkling_mm_model": "inkling_text",
    "internvl": "qwen3_moe",
    "kimi_k25": "deepseek_v3",
    "lfm2_vl": "lfm2_moe",
    "llava": "mixtral",
    "minimax_m3_vl": "minimax_m3_vl_text",
    "mistral3": "mistral4",
    "nemotron_h_omni": "nemotron_h",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen4_exp": "qwen4_exp_text",
}

_LONGEST_NAME = 64  # no family has a longer one


@dataclass(frozen=True, kw_only=True)
class Family:
    """The classes of transformers for one family.

    Attributes:
        model_type: Its name in config.json.
        causal_lm: The language model class.
    """

    model_type: str
    causal_lm: type[Any]

    @property
    def configuration(self) -> type[PreTrainedConfig]:
        """The configuration class of the language model."""
        found: type[PreTrainedConfig] = self.causal_lm.config_class
        return found


def find_family(model_type: object, *, wrapper: str | None = None) -> Family:
    """Find a family by its name in config.json.

    Args:
        model_type: The value of `model_type`.
        wrapper: The model that this one is the language part of, for messages.

    Returns:
        Its classes.

    Raises:
        FamilyError: transformers has no such language model, or it has no experts.
    """
    causal_lm = _causal_lm(model_type) if isinstance(model_type, str) else None
    if causal_lm is None:
        raise unknown_family(model_type, wrapper=wrapper)
    if not _has_experts(causal_lm):
        raise _refusal(
            model_type if wrapper is None else wrapper,
            "it has no experts"
            if wrapper is None
            else f"its language part {model_type} has no experts",
        )
    return Family(model_type=str(model_type), causal_lm=causal_lm)


def unknown_family(model_type: object, *, wrapper: str | None = None) -> FamilyError:
    """Say that transformers has no language model of a name, and which one may be meant.

    Args:
        model_type: The value of `model_type`.
        wrapper: The model that this one is the language part of.

    Returns:
        The error to raise.
    """
    from transformers import __version__

    if wrapper is not None:
        return _refusal(
            wrapper,
            f"transformers {__version__} has no class for its language part {model_type} alone",
        )
    return _refusal(
        model_type, f"transformers {__version__} has no language model of that name"
    )


def _refusal(model_type: object, reason: str) -> FamilyError:
    near = _nearest(model_type) if isinstance(model_type, str) else None
    return FamilyError(
        f"model family must be one with experts, got {quote(model_type)}: {reason}. "
        + (f"Did you mean {near}? " if near else "")
        + "docs/families.md lists the families that edgemoe is tested with. A dense llama "
        "checkpoint becomes a Mixture-of-Experts model with `edgemoe carve`."
    )


def _nearest(model_type: str) -> str | None:
    """Return the family whose name is nearly this one."""
    name = model_type[:_LONGEST_NAME].lower().replace("-", "_").replace(" ", "_")
    found = difflib.get_close_matches(name, FAMILIES, n=1, cutoff=0.8)
    return found[0] if found and found[0] != model_type else None


def _causal_lm(model_type: str) -> type[Any] | None:
    from transformers.models.auto import configuration_auto, modeling_auto

    name = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model_type not in configuration_auto.CONFIG_MAPPING_NAMES:
        return None
    folder = configuration_auto.model_type_to_module_name(model_type)
    try:
        module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    except ImportError:
        return None
    if name is not None:
        found: type[Any] | None = getattr(module, name, None)
        return found
    # A few language models are missing from the automatic classes.
    for candidate in vars(module).values():
        if isinstance(candidate, type) and candidate.__name__.endswith("ForCausalLM"):
            # A file may import the automatic class, which has no configuration.
            configuration = getattr(candidate, "config_class", None)
            if getattr(configuration, "model_type", None) == model_type:
                causal_lm: type[Any] = candidate
                return causal_lm
    from edgemoe.models.headless import with_head

    return with_head(model_type, module)


def _has_experts(causal_lm: type[Any]) -> bool:
    module = importlib.import_module(causal_lm.__module__)
    return any(is_experts_class(value) for value in vars(module).values())
