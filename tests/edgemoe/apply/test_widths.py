"""Narrower experts say what the whole ones say with those neurons switched off."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from edgemoe.apply.in_memory import applied, apply_plan
from edgemoe.apply.streamed import apply_streamed
from edgemoe.calibrate.collect import collect
from edgemoe.calibrate.statistics import Statistics
from edgemoe.cli.describe.file import describe
from edgemoe.errors import CheckpointError, PlanError
from edgemoe.models import load_model, load_tokenizer, read_shape, save_model
from edgemoe.models.layers.factored import factor_layer, split_by_svd
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe.plans.channels import read_mask, write_mask
from edgemoe.plans.layer_plan import stored_width
from edgemoe.plans.plan import LayerPlan, MergedExpert, Plan
from edgemoe.sweep.sizes import Sizes
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models import MoeModel

# Each stores, names or runs experts in a way of its own; the first have an entry for
# nothing but the width of routed experts.
OWN_ENTRY = ("gemma4_text", "gpt_oss", "granitemoe", "mixtral", "nemotron_h", "qwen3_moe")
SHARED_ENTRY = ("aria_text", "cohere2_moe", "deepseek_v3", "glm4_moe")


def plan_for(path: Path, counts: tuple[int, ...]) -> Plan:
    """Keep drawn neurons: those of a layer's first expert, and up to two fewer of others."""
    shape = read_shape(path)
    draw = np.random.Generator(np.random.PCG64(0))
    layers = []
    for number, layer in enumerate(shape.layers):
        size, count = shape.width_of(layer.layer), counts[number % len(counts)]
        kept = [
            sorted(draw.permutation(size)[: count - e % 3].tolist())
            for e in range(layer.num_experts)
        ]
        layers.append(
            LayerPlan(
                layer=layer.layer,
                experts=tuple(
                    MergedExpert(members=(e,), neurons=write_mask(neurons, size))
                    for e, neurons in enumerate(kept)
                ),
            )
        )
    return Plan(method="by hand", layers=tuple(layers))


@torch.no_grad()
def switch_off(model: MoeModel, plan: Plan) -> None:
    """Set the down columns of all other neurons to zero."""
    for layer, layer_plan in zip(model.layers, plan.layers, strict=True):
        down = layer.tensor(f"{layer.spec.experts}.down_proj")
        columns = down.transpose(1, 2) if layer.layout.is_transposed else down
        for number, expert in enumerate(layer_plan.experts):
            gone = set(range(layer.intermediate_size)) - set(read_mask(str(expert.neurons)))
            columns[number, :, sorted(gone)] = 0


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, VOCAB_SIZE, (2, 11), generator=draw)
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("counts", [(16,), (8, 19)], ids=["one-width", "ragged"])
@pytest.mark.parametrize("family", [*OWN_ENTRY, *SHARED_ENTRY])
def test_padding_is_exact_in_memory_streamed_and_saved(
    family: str, counts: tuple[int, ...], tmp_path: Path
) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "whole")
    plan = plan_for(path, counts)
    expected = load_model(path)
    before = logits_of(expected.model)
    switch_off(expected, plan)
    want = logits_of(expected.model)
    assert (want - before).abs().max() > 1e-2 * before.abs().max()

    small = apply_plan(load_model(path), plan)

    widths = plan.widths(read_shape(path))
    assert widths == tuple(
        16 if counts == (16,) else (8, 24)[n % 2] for n in range(len(widths))
    )
    assert [layer.intermediate_size for layer in small.layers] == list(widths)
    torch.testing.assert_close(logits_of(small.model), want, rtol=1e-4, atol=3e-5)
    (tmp_path / "small").mkdir()
    save_model(small, tmp_path / "small", source=path)
    written = apply_streamed(path, plan, tmp_path / "streamed")
    assert written.widths_per_layer == widths
    found, again = load_model(tmp_path / "streamed"), load_model(tmp_path / "small")
    state = again.model.state_dict()
    for name, tensor in found.model.state_dict().items():
        assert torch.equal(state[name], tensor), name
    torch.testing.assert_close(logits_of(found.model), want, rtol=1e-4, atol=3e-5)
    for name in ("config.json", "edgemoe.json"):
        one, other = tmp_path / "small" / name, tmp_path / "streamed" / name
        assert one.exists() == other.exists()
        if one.exists():
            assert one.read_bytes() == other.read_bytes()
    shape = read_shape(tmp_path / "small")
    assert (
        shape.widths_per_layer == open_streamed(tmp_path / "small").moe.shape.widths_per_layer
    )
    assert shape.widths_per_layer == widths
    plain = not (tmp_path / "small" / "edgemoe.json").exists()
    assert plain == (counts == (16,) and family in OWN_ENTRY)
    told = describe(tmp_path / "small")
    assert told["expert_intermediate_size"] == max(widths)
    assert told.get("widths_per_layer") == (None if len(set(widths)) == 1 else list(widths))


@pytest.mark.parametrize("family", OWN_ENTRY)
def test_one_width_is_a_checkpoint_of_plain_transformers(family: str, tmp_path: Path) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "whole")
    plan = plan_for(path, (16,))
    apply_streamed(path, plan, tmp_path / "small")

    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "small", dtype=torch.float32).eval()

    expected = load_model(path)
    switch_off(expected, plan)
    torch.testing.assert_close(
        logits_of(stock), logits_of(expected.model), rtol=1e-4, atol=3e-5
    )
    assert stock.num_parameters() < expected.model.num_parameters()


def test_what_is_narrow_already_can_be_measured_and_narrowed_again(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("glm4_moe", tmp_path / "whole")
    apply_streamed(path, plan_for(path, (24, 19, 16)), tmp_path / "once")
    (tmp_path / "task.jsonl").write_text('{"text": "w3 w5 w7 w9 w11 w13 w15"}\n' * 3)
    task = TaskFile.load("t", tmp_path / "task.jsonl")
    statistics = collect(
        load_model(tmp_path / "once"), [task], load_tokenizer(tmp_path / "once")
    )
    statistics.save(tmp_path / "stats")
    assert Statistics.load(tmp_path / "stats").shape == read_shape(tmp_path / "once")
    assert statistics.shape.widths_per_layer == (24, 24, 16)

    plan = plan_for(tmp_path / "once", (8,))
    apply_streamed(tmp_path / "once", plan, tmp_path / "twice")

    expected = load_model(tmp_path / "once")
    switch_off(expected, plan)
    found = load_model(tmp_path / "twice")
    torch.testing.assert_close(
        logits_of(found.model), logits_of(expected.model), rtol=1e-4, atol=3e-5
    )
    assert found.shape.widths_per_layer == (8, 8, 8)
    # Narrow experts can be factored then; the note tells both.
    for layer in found.layers:
        factor_layer(layer, split_by_svd(layer, 4))
    (tmp_path / "factored").mkdir()
    save_model(found, tmp_path / "factored", source=tmp_path / "twice")
    again = load_model(tmp_path / "factored")
    assert torch.equal(logits_of(again.model), logits_of(found.model))
    with pytest.raises(PlanError, match="must have whole experts for neurons to be chosen"):
        apply_plan(again, plan_for(tmp_path / "factored", (4,)))


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_experts_may_be_dropped_and_narrowed_at_once_and_for_a_while(
    family: str, tmp_path: Path
) -> None:
    path = write_tiny_checkpoint(family, tmp_path / "whole")
    whole = plan_for(path, (19, 9))
    plan = Plan(
        method="by hand",
        layers=tuple(
            LayerPlan(layer=layer.layer, experts=layer.experts[2:7]) for layer in whole.layers
        ),
    )
    model = load_model(path)
    before = logits_of(model.model)
    with applied(model, plan):
        inside = logits_of(model.model)
    assert torch.equal(logits_of(model.model), before)
    sizes = Sizes.of(model, plan.experts_per_layer, plan.widths(model.shape))
    small = apply_plan(load_model(path), plan)
    assert torch.equal(logits_of(small.model), inside)
    assert Sizes.of(small, plan.experts_per_layer) == sizes
    assert sizes.experts == 5 * len(plan.layers)
    reference = load_model(path)
    switch_off(reference, whole)
    for layer in reference.layers:
        layer.keep(range(2, 7))
    torch.testing.assert_close(logits_of(reference.model), inside, rtol=1e-4, atol=3e-5)
    for layer, layer_plan in zip(small.layers, plan.layers, strict=True):
        assert layer.intermediate_size == stored_width(layer_plan.experts, 32)


def test_a_note_with_wrong_widths_is_refused(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("glm4_moe", tmp_path / "whole")
    apply_streamed(path, plan_for(path, (16,)), tmp_path / "small")
    file = tmp_path / "small" / "edgemoe.json"
    content = json.loads(file.read_text())
    assert content["widths_per_layer"] == [16, 16, 16]
    for wrong, rule in (
        ([16, 16], "must have an integer for each of the 3 MoE layers, got 2"),
        ([16, 0, 16], r"widths_per_layer must be a list of integers in \[1, inf\)"),
        ([16, 24, 16], "must fit its config.json"),
    ):
        file.write_text(json.dumps({**content, "widths_per_layer": wrong}))
        with pytest.raises(CheckpointError, match=rule):
            load_model(tmp_path / "small")


def test_a_plan_of_another_width_moves_nothing(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("qwen3_moe", tmp_path / "whole", moe_intermediate_size=40)
    plan = plan_for(write_tiny_checkpoint("qwen3_moe", tmp_path / "other"), (16,))
    model = load_model(path)
    before = logits_of(model.model)
    with pytest.raises(PlanError, match="expert 0 must be 10 hexadecimal digits for its 40"):
        apply_plan(model, plan)
    with pytest.raises(PlanError, match="hexadecimal digits for its 40 neurons"):
        apply_streamed(path, plan, tmp_path / "small")
    assert torch.equal(logits_of(model.model), before)
    assert not (tmp_path / "small").exists()


def test_experts_that_share_a_tensor_with_others_are_refused_by_name(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("qwen3_moe", tmp_path / "whole")
    model = load_model(path)
    layer = model.layers[1]
    first, *rest = layer.spec.tensors
    assert first.name.startswith("experts.")
    # No family is built so today: what discovery would say of one that is.
    layer.spec = replace(layer.spec, tensors=(replace(first, tail=1), *rest))
    with pytest.raises(
        PlanError, match=r"got qwen3_moe, where experts\.\w+ also holds experts"
    ):
        apply_plan(model, plan_for(path, (16,)))
