"""Families in the wrappers in which they are published, whole and layer by layer."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from edgemoe.apply.in_memory import apply_plan
from edgemoe.apply.streamed import apply_streamed
from edgemoe.errors import CheckpointError, FamilyError
from edgemoe.models import FAMILIES, load_model
from edgemoe.models.checkpoint import Checkpoint
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import VOCAB_SIZE
from edgemoe.models.weights.name_words import HEARING, SEEING
from edgemoe.prune import LayerPlan, MergedExpert, Plan
from tests.edgemoe.models.published import WRAPPERS, publish

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models import MoeModel

# Those that say the most: names below a prefix, experts that only the whole stacks, and
# transformers' rules for the whole.
FAST = ("gemma4", "minimax_m3_vl", "kimi_k25")
CASES = [
    pytest.param(wrapper, marks=() if wrapper in FAST else pytest.mark.slow)
    for wrapper in WRAPPERS
]


def random_ids() -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (2, 11), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=random_ids(), use_cache=False).logits
    return logits


def plan_without_the_last(model: MoeModel) -> Plan:
    """Drop an expert of each group of the first MoE layer alone: the others are copied."""
    layers = []
    for position, layer in enumerate(model.layers):
        size = layer.num_experts // layer.shape.n_group
        kept = [
            expert for expert in range(layer.num_experts) if position or (expert + 1) % size
        ]
        experts = tuple(MergedExpert(members=(expert,)) for expert in kept)
        layers.append(LayerPlan(layer=layer.index, experts=experts))
    return Plan(method="by-hand", layers=tuple(layers), checkpoint_sha256=model.sha256)


@pytest.mark.parametrize("wrapper", CASES)
def test_the_language_model_of_a_published_checkpoint_is_read(
    wrapper: str, tmp_path: Path
) -> None:
    whole = publish(wrapper, tmp_path / "whole")

    model = load_model(tmp_path / "whole")

    assert model.family == WRAPPERS[wrapper][0]
    assert torch.equal(logits_of(model.model), logits_of(whole))
    left_out = {part.what: part for part in Checkpoint(tmp_path / "whole").left_out}
    assert left_out.keys() <= {SEEING, HEARING}
    assert left_out[SEEING].tensors > 0
    assert left_out[SEEING].nbytes > 0
    expected = model.model.state_dict()
    skeleton = open_streamed(tmp_path / "whole").skeleton
    for index in range(len(skeleton.layers)):
        with skeleton.layer(index):
            for name, tensor in skeleton.layer_tensors(index).items():
                assert torch.equal(tensor, expected[name]), name
    plan = plan_without_the_last(model)
    apply_streamed(tmp_path / "whole", plan, tmp_path / "small")
    small = apply_plan(model, plan).model.state_dict()
    again = load_model(tmp_path / "small").model.state_dict()
    assert again.keys() == small.keys()
    for name, tensor in small.items():
        assert torch.equal(again[name], tensor), name


def test_a_pruned_language_part_opens_with_stock_transformers(tmp_path: Path) -> None:
    publish("minimax_m3_vl", tmp_path / "whole")
    model = load_model(tmp_path / "whole")
    layers = tuple(
        LayerPlan(
            layer=layer.index, experts=tuple(MergedExpert(members=(n,)) for n in range(6))
        )
        for layer in model.layers
    )
    plan = Plan(method="by-hand", layers=layers, checkpoint_sha256=model.sha256)

    apply_streamed(tmp_path / "whole", plan, tmp_path / "small")

    stock, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "small", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[f"{kind}_keys"] for kind in ("missing", "unexpected", "mismatched"))
    ours = load_model(tmp_path / "small")
    torch.testing.assert_close(logits_of(stock.eval()), logits_of(ours.model))


@pytest.mark.slow
def test_every_wrapper_of_a_family_is_tried() -> None:
    """A wrapper that a release of transformers adds must get a row in `WRAPPERS`."""
    # No weights but a gigabyte of a recogniser of speech: nemotron_h is tried in another.
    tried = {*WRAPPERS, "nemo_speechlm"}
    found = set()
    for name in CONFIG_MAPPING_NAMES:
        parts = getattr(CONFIG_MAPPING[name], "sub_configs", None) or {}
        text = getattr(parts.get("text_config"), "model_type", None)
        if text in FAMILIES:
            found.add(name)

    assert found <= tried
    assert {WRAPPERS[name][0] for name in WRAPPERS} >= {
        name for name in FAMILIES if name.endswith("_text")
    }


@pytest.mark.parametrize("tied", [False, True])
def test_what_stands_beside_the_language_part_holds_for_it(tied: bool, tmp_path: Path) -> None:
    whole = publish("kimi_k25", tmp_path, tie_word_embeddings=tied)
    file = tmp_path / "config.json"
    content = json.loads(file.read_text())
    content.update(eos_token_id=[5, 6], pad_token_id=7, dtype="bfloat16")
    for name in ("tie_word_embeddings", "eos_token_id", "pad_token_id", "dtype"):
        content["text_config"].pop(name, None)
    file.write_text(json.dumps(content))

    model = load_model(tmp_path)

    assert model.config.tie_word_embeddings is tied
    assert (model.config.eos_token_id, model.config.pad_token_id) == ([5, 6], 7)
    assert model.stored_dtype == torch.bfloat16
    assert torch.equal(logits_of(model.model), logits_of(whole))


def test_weights_that_config_json_ties_and_that_differ_stay_apart(tmp_path: Path) -> None:
    whole = publish("kimi_k25", tmp_path / "whole", tie_word_embeddings=False)
    file = tmp_path / "whole" / "config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, "tie_word_embeddings": True}))

    model = load_model(tmp_path / "whole")
    streamed = open_streamed(tmp_path / "whole")

    assert torch.equal(logits_of(model.model), logits_of(whole))
    assert model.config.tie_word_embeddings is False
    assert streamed.moe.config.tie_word_embeddings is False
    apply_streamed(tmp_path / "whole", plan_without_the_last(model), tmp_path / "small")
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    # False is the default, which transformers does not write.
    assert not written.get("tie_word_embeddings")


def test_of_two_names_for_one_tensor_neither_is_guessed(tmp_path: Path) -> None:
    publish("gemma4", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    tensors[name.replace("language_model.", "")] = tensors[name] + 1
    save_file(tensors, file, metadata={"format": "pt"})

    for read in (load_model, open_streamed):
        with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj.* both stand for"):
            read(tmp_path)


def test_a_wrapper_without_a_class_for_its_language_part_is_refused_by_name(
    tmp_path: Path,
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_vl_moe"}))

    with pytest.raises(
        FamilyError, match=r"got 'qwen3_vl_moe': .* for its language part qwen3_vl_moe_text"
    ):
        load_model(tmp_path)
