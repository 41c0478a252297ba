"""What a traced graph looks like, and that tracing leaves the model as it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

from edgemoe.errors import ExportError
from edgemoe.models.adapter import adapt_model
from edgemoe_exporters.graph.metadata import DOMAIN, EXPERT_AXIS, LAYER
from edgemoe_exporters.tracing.prepare.model import prepared
from edgemoe_exporters.tracing.trace import trace


@pytest.mark.parametrize("family", ["glm4_moe", "qwen2_moe", "mixtral"])
def test_graph_has_custom_ops_and_the_names_of_the_checkpoint(
    traced_models: Any, family: Any
) -> None:
    traced = traced_models(family)
    graph, model = traced.graph.graph, traced.model
    layers = model.config.num_hidden_layers
    custom = Counter(node.op_type for node in graph if node.domain == DOMAIN)
    assert custom["Route"] == custom["Experts"] == len(model.layers)
    assert custom["Attention"] == layers
    assert custom["RotaryEmbedding"] == 2 * layers
    assert custom["RMSNorm"] >= 2 * layers + 1

    cache = [f"{i}.{part}" for i in range(layers) for part in ("key", "value")]
    assert [value.name for value in graph.inputs] == [
        "input_ids",
        "attention_mask",
        "position_ids",
        *(f"past_key_values.{name}" for name in cache),
        "k_cap",
    ]
    assert [value.name for value in graph.outputs] == [
        "logits",
        *(f"present.{name}" for name in cache),
    ]
    state = model.model.state_dict()
    tied = model.config.tie_word_embeddings
    expected = {name for name in state if not (tied and name == "lm_head.weight")}
    assert expected <= set(graph.initializers)
    for name in expected:
        array = graph.initializers[name].const_value.numpy()
        assert torch.equal(torch.from_numpy(array), state[name]), name


def test_expert_tensors_say_which_layer_they_are_of(traced_models: Any) -> None:
    traced = traced_models("glm4_moe")
    marked = {
        name: value.metadata_props[LAYER]
        for name, value in traced.graph.graph.initializers.items()
        if value.metadata_props.get(EXPERT_AXIS) == "0"
    }
    assert len(marked) == 4 * len(traced.model.layers)
    assert all(name.startswith(f"model.layers.{layer}.mlp.") for name, layer in marked.items())


def test_graph_says_nothing_of_the_machine_that_traced_it(traced_models: Any) -> None:
    graph = traced_models("mixtral").graph.graph
    assert not any(node.metadata_props or node.doc_string for node in graph)


def test_the_prepared_model_computes_the_same_and_is_restored(traced_models: Any) -> None:
    model = traced_models("glm4_moe").model
    ids = torch.randint(0, 199, (2, 5))
    before = model.model(ids).logits
    with prepared(model) as module:
        past = [tensor.zeros(2, 0, torch.float32) for tensor in module.cached]
        caps = torch.full((len(model.layers),), 99)
        positions = torch.arange(5).repeat(2, 1)
        logits, present = module(ids, torch.ones_like(ids), positions, past, caps)
    torch.testing.assert_close(logits, before, atol=1e-4, rtol=1e-4)
    assert [part.shape for part in present] == [(2, 2, 5, 16)] * 6
    assert torch.equal(model.model(ids).logits, before)


def test_rotation_that_depends_on_the_length_is_refused() -> None:
    config = Glm4MoeConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        moe_intermediate_size=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=0,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )
    model = adapt_model(Glm4MoeForCausalLM(config))
    with pytest.raises(ExportError, match="rope_type must not be one of"):
        trace(model)
