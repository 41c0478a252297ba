"""One test for every private name of transformers that edgemoe uses."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn
from transformers import (
    AttentionInterface,
    BartConfig,
    BartForConditionalGeneration,
    MixtralConfig,
    MixtralForCausalLM,
)

from edgemoe.models import transformers_internals as internals
from edgemoe.models.registry import find_family

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def mixtral(make_model: Callable[..., Any]) -> MixtralForCausalLM:
    model: MixtralForCausalLM = make_model("mixtral")
    return model


def experts_of(model: MixtralForCausalLM) -> Any:
    return next(m for m in model.modules() if type(m).__name__.endswith("Experts"))


def test_the_experts_contract_is_a_mark_of_classes(mixtral: MixtralForCausalLM) -> None:
    assert internals.keeps_experts_contract(type(experts_of(mixtral)))
    assert not internals.keeps_experts_contract(nn.Linear)


def test_the_gate_of_experts_can_be_run_alone(mixtral: MixtralForCausalLM) -> None:
    units = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))

    found = internals.apply_gate(experts_of(mixtral), units)

    gate, up = units.chunk(2, dim=-1)
    torch.testing.assert_close(found, nn.functional.silu(gate) * up)


def test_what_is_marked_is_not_drawn_and_what_is_not_is(mixtral: MixtralForCausalLM) -> None:
    linear = mixtral.lm_head
    with torch.no_grad():
        linear.weight.fill_(7.0)

    internals.mark_initialised(linear.weight)
    internals.draw_weights(mixtral, linear)
    assert bool((linear.weight == 7.0).all())

    internals.mark_initialised(linear.weight, initialised=False)
    internals.draw_weights(mixtral, linear)
    assert not bool((linear.weight == 7.0).any())


def test_what_no_checkpoint_holds_is_computed_on_a_skeleton(
    mixtral: MixtralForCausalLM,
) -> None:
    with torch.device("meta"):
        skeleton = MixtralForCausalLM(mixtral.config)
    for parameter in skeleton.parameters():
        internals.mark_initialised(parameter)

    internals.move_from_meta(skeleton, set(), "cpu")
    with torch.no_grad():
        internals.compute_unstored(skeleton)

    for name, table in skeleton.named_buffers():
        torch.testing.assert_close(table, mixtral.get_buffer(name))
    assert dict(mixtral.named_buffers())


def test_families_say_what_their_checkpoints_may_lack(mixtral: MixtralForCausalLM) -> None:
    assert list(internals.optional_patterns(mixtral)) == []
    tiny = {"d_model": 8, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8, "vocab_size": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    layers = {"encoder_layers": 1, "decoder_layers": 1}
    bart = BartForConditionalGeneration(BartConfig(**tiny, **heads, **layers))
    assert "final_logits_bias" in internals.optional_patterns(bart)


def test_families_say_what_they_leave_out(mixtral: MixtralForCausalLM) -> None:
    assert list(internals.needless_patterns(mixtral)) == []
    family = find_family("qwen3_next").causal_lm
    assert list(internals.needless_patterns(family)) == [r"^mtp.*"]


def test_families_say_which_tensors_keep_their_type(make_model: Callable[..., Any]) -> None:
    plan = internals.dtype_plan(make_model("glm4_moe"), torch.bfloat16)

    assert plan["e_score_correction_bias"] == torch.float32
    assert internals.dtype_plan(make_model("mixtral"), torch.bfloat16) == {}


def test_saving_reverts_the_rules_that_it_is_given(
    mixtral: MixtralForCausalLM, tmp_path: Path
) -> None:
    from safetensors import safe_open
    from transformers.conversion_mapping import get_model_conversion_mapping

    def names() -> set[str]:
        mixtral.save_pretrained(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "pt") as file:
            return set(file.keys())

    internals.set_saving_rules(mixtral, [])
    assert any(name.endswith("experts.gate_up_proj") for name in names())

    internals.set_saving_rules(mixtral, get_model_conversion_mapping(mixtral))
    assert any(name.endswith("experts.0.w1.weight") for name in names())


def test_infinities_of_a_config_are_read(mixtral: MixtralForCausalLM) -> None:
    mixtral.config.limit = math.inf
    written = json.loads(mixtral.config.to_json_string())

    assert written["limit"] != math.inf
    assert internals.read_special_floats(MixtralConfig, written)["limit"] == math.inf


def test_the_attention_of_a_built_model_can_be_changed(mixtral: MixtralForCausalLM) -> None:
    calls = []

    def attention(module: nn.Module, query: torch.Tensor, *_: Any, **__: Any) -> Any:
        calls.append(module)
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("counted", attention)
    before = internals.attention_implementation(mixtral.config)
    internals.set_attention_implementation(mixtral.config, "counted")
    mixtral(input_ids=torch.tensor([[1, 2, 3]]))

    assert before != "counted"
    assert internals.attention_implementation(mixtral.config) == "counted"
    assert len(calls) == mixtral.config.num_hidden_layers
