"""The families that edgemoe knows: one typed declaration each.

A further family is a row here and, where its router is of a new kind, a rule in
:mod:`edgemoe.models.routers`. Classes are named, not imported, so that a refusal costs no
import of transformers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from edgemoe.errors import FamilyError
from edgemoe.models.routers import glm4_moe_rule, mixtral_rule, qwen2_moe_rule

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

    from edgemoe.models.contract import RouterRule


@dataclass(frozen=True, kw_only=True)
class Family:
    """Where transformers keeps what edgemoe needs of a family.

    Attributes:
        model_type: Its name in config.json.
        module: Module of the modeling classes.
        configuration: Name of the configuration class, exported by transformers.
        causal_lm: Name of the language model class.
        block: Name of the MoE block class.
        router: Name of the router class; it returns logits, gates and experts.
        rule: Reads how the router chooses from a configuration.
        expert_counts: Configuration entries that say how many experts a layer has.
        shared: Attributes of the block that every token uses besides the router.
        bias: Attribute of the router that holds its correction bias.
    """

    model_type: str
    module: str
    configuration: str
    causal_lm: str
    block: str
    router: str
    rule: Callable[[PreTrainedConfig], RouterRule]
    expert_counts: tuple[str, ...]
    shared: tuple[str, ...] = ()
    bias: str | None = None

    def load_class(self, name: str) -> type[Any]:
        """Import one of the family's modeling classes.

        Args:
            name: Class name.

        Returns:
            The class.
        """
        found: type[Any] = getattr(importlib.import_module(self.module), name)
        return found


FAMILIES: dict[str, Family] = {
    "glm4_moe": Family(
        model_type="glm4_moe",
        module="transformers.models.glm4_moe.modeling_glm4_moe",
        configuration="Glm4MoeConfig",
        causal_lm="Glm4MoeForCausalLM",
        block="Glm4MoeMoE",
        router="Glm4MoeTopkRouter",
        rule=glm4_moe_rule,
        expert_counts=("n_routed_experts", "num_local_experts"),
        shared=("shared_experts",),
        bias="e_score_correction_bias",
    ),
    "mixtral": Family(
        model_type="mixtral",
        module="transformers.models.mixtral.modeling_mixtral",
        configuration="MixtralConfig",
        causal_lm="MixtralForCausalLM",
        block="MixtralSparseMoeBlock",
        router="MixtralTopKRouter",
        rule=mixtral_rule,
        expert_counts=("num_local_experts", "num_experts"),
    ),
    "qwen2_moe": Family(
        model_type="qwen2_moe",
        module="transformers.models.qwen2_moe.modeling_qwen2_moe",
        configuration="Qwen2MoeConfig",
        causal_lm="Qwen2MoeForCausalLM",
        block="Qwen2MoeSparseMoeBlock",
        router="Qwen2MoeTopKRouter",
        rule=qwen2_moe_rule,
        expert_counts=("num_experts",),
        shared=("shared_expert", "shared_expert_gate"),
    ),
}


def find_family(model_type: object) -> Family:
    """Find a family by its name in config.json.

    Args:
        model_type: The value of ``model_type``.

    Returns:
        Its declaration.

    Raises:
        FamilyError: The family is not supported.
    """
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        supported = ", ".join(sorted(FAMILIES))
        raise FamilyError(
            f"model family must be one of {supported}, got {model_type!r}. A dense llama "
            "checkpoint becomes a supported one with `edgemoe carve`."
        )
    return family
