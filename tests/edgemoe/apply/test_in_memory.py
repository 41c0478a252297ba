from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgemoe.apply.in_memory import apply_plan
from edgemoe.apply.merge import merge_experts
from edgemoe.errors import PlanError
from edgemoe.models import adapt_model, load_model, save_model
from edgemoe.prune import LayerPlan, MergedExpert, Plan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgemoe.models import MoeModel

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe")


def make_plan(model: MoeModel, kept: Sequence[Sequence[int | MergedExpert]]) -> Plan:
    layers = tuple(
        LayerPlan(
            layer=layer.index,
            experts=tuple(
                entry if isinstance(entry, MergedExpert) else MergedExpert(members=(entry,))
                for entry in entries
            ),
        )
        for layer, entries in zip(model.layers, kept, strict=True)
    )
    return Plan(method="frequency", layers=layers, checkpoint_sha256=model.sha256, task="bible")


def save(model: MoeModel, path: Path, source: Path) -> Path:
    path.mkdir()
    save_model(model, path, source=source)
    return path


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_all_experts_changes_no_bit(
    make_model: Callable[..., Any], token_ids: torch.Tensor, family: str
) -> None:
    model = adapt_model(make_model(family))
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    logits = model.model(token_ids).logits

    after = apply_plan(model, make_plan(model, [range(8)] * len(model.layers)))

    assert torch.equal(after.model(token_ids).logits, logits)
    for name, tensor in after.model.state_dict().items():
        assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("family", FAMILIES)
def test_dropping_equals_never_choosing(
    make_model: Callable[..., Any], token_ids: torch.Tensor, family: str
) -> None:
    """The oracle masks the dropped experts' logits in the uncompressed model."""
    model = adapt_model(make_model(family))
    kept = [[7, 0, 3, 4], [1, 2, 3, 5, 6], [0, 2, 7]][: len(model.layers)]
    handles = []
    for layer, ids in zip(model.layers, kept, strict=True):
        dropped = torch.ones(8, dtype=torch.bool)
        dropped[ids] = False

        def mask(
            module: Any, args: Any, output: Any, dropped: Any = dropped, layer: Any = layer
        ) -> Any:
            logits = output[0].masked_fill(dropped, -1e9)
            scores = logits.sigmoid() if layer.rule.scoring == "sigmoid" else logits.softmax(-1)
            bias = layer.correction_bias
            choice = scores if bias is None else scores + bias
            indices = choice.masked_fill(dropped, -1e9).topk(layer.top_k).indices
            gates = scores.gather(1, indices)
            if layer.rule.renormalise:
                gates = gates / gates.sum(-1, keepdim=True)
            return output[0], gates * layer.rule.scaling_factor, indices

        handles.append(layer.router.register_forward_hook(mask))
    expected = model.model(token_ids).logits
    for handle in handles:
        handle.remove()

    after = apply_plan(model, make_plan(model, kept))

    assert after.experts_per_layer == tuple(len(ids) for ids in kept)
    torch.testing.assert_close(after.model(token_ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_biases_and_experts_move_in_lockstep(
    make_model: Callable[..., Any], family: str
) -> None:
    model = adapt_model(make_model(family))
    layer = model.layers[0]
    gate_up, down, rows = (t.clone() for t in (layer.gate_up, layer.down, layer.router_weight))
    bias = None if layer.correction_bias is None else layer.correction_bias.clone()
    merged = MergedExpert(members=(6, 2), weights=(3.0, 1.0))
    others = [range(8)] * (len(model.layers) - 1)

    apply_plan(model, make_plan(model, [[5, merged, 1], *others]))

    # By rising first member: 1, then the one of 2 and 6, then 5.
    assert torch.equal(layer.gate_up[[0, 2]], gate_up[[1, 5]])
    assert torch.equal(layer.down[[0, 2]], down[[1, 5]])
    assert torch.equal(layer.router_weight[[0, 2]], rows[[1, 5]])
    torch.testing.assert_close(layer.router_weight[1], 0.25 * rows[2] + 0.75 * rows[6])
    members = {"gate_up_proj": gate_up[[2, 6]], "down_proj": down[[2, 6]]}
    expected = merge_experts(members, (0.25, 0.75), reference=1)
    assert torch.equal(layer.gate_up[1], expected["gate_up_proj"])
    assert torch.equal(layer.down[1], expected["down_proj"])
    if bias is not None and layer.correction_bias is not None:
        assert torch.equal(layer.correction_bias[[0, 2]], bias[[1, 5]])
        torch.testing.assert_close(layer.correction_bias[1], 0.25 * bias[2] + 0.75 * bias[6])


def test_merging_copies_of_one_expert_loses_nothing(
    make_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    """Experts 0-3 are also 4-7, in other orders of their neurons, and routers choose 0-3."""
    model = adapt_model(make_model("glm4_moe"))
    for layer in model.layers:
        for expert in range(4):
            order = torch.randperm(16, generator=torch.Generator().manual_seed(expert))
            both = torch.cat((order, order + 16))
            layer.gate_up[expert + 4] = layer.gate_up[expert, both]
            layer.down[expert + 4] = layer.down[expert][:, order]
            layer.router_weight[expert + 4] = layer.router_weight[expert]
            bias = layer.correction_bias
            assert bias is not None
            bias[expert] += 10
            bias[expert + 4] = bias[expert] - 20
    expected = model.model(token_ids).logits
    pairs = [
        MergedExpert(members=(expert, expert + 4), weights=(0.9, 0.1)) for expert in range(4)
    ]

    after = apply_plan(model, make_plan(model, [pairs, pairs]))

    torch.testing.assert_close(after.model(token_ids).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ragged", [False, True])
def test_the_same_plan_gives_the_same_bytes_and_they_reload(
    make_checkpoint: Callable[..., Path],
    token_ids: torch.Tensor,
    tmp_path: Path,
    family: str,
    ragged: bool,
) -> None:
    source = make_checkpoint(family)
    merged = MergedExpert(members=(2, 3))
    paths = []
    for number in range(2):
        model = load_model(source)
        kept: list[list[int | MergedExpert]]
        kept = [
            [0, 1, merged, 5],
            [1, 4, 5, merged, *([7] if ragged else [])],
            [0, 6, 7, merged],
        ]
        after = apply_plan(model, make_plan(model, kept[: len(model.layers)]))
        assert after.path is None
        paths.append(save(after, tmp_path / f"saved{number}", source))

    first, second_path = paths
    for file in first.iterdir():
        assert file.read_bytes() == (second_path / file.name).read_bytes()
    assert (first / "edgemoe.json").exists() == ragged
    again = load_model(first)
    assert torch.equal(again.model(token_ids).logits, after.model(token_ids).logits)
    assert again.provenance is not None
    assert again.provenance["task"] == "bible"
    assert again.provenance["checkpoint_sha256"] == load_model(source).sha256
    if not ragged:
        stock = AutoModelForCausalLM.from_pretrained(first).eval()
        assert torch.equal(stock(token_ids).logits, after.model(token_ids).logits)


def test_a_compressed_checkpoint_can_be_compressed_again(
    make_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_checkpoint("mixtral")
    model = load_model(source)
    once = apply_plan(model, make_plan(model, [range(6), range(5), range(4)]))
    reopened = load_model(save(once, tmp_path / "once", source))

    twice = apply_plan(reopened, make_plan(reopened, [range(3)] * 3))

    path = save(twice, tmp_path / "twice", source)
    assert not (path / "edgemoe.json").exists()
    assert load_model(path).experts_per_layer == (3, 3, 3)
    assert twice.provenance is not None
    assert twice.provenance["before"]["plan_sha256"] == once.provenance["plan_sha256"]  # type: ignore[index]


def test_a_refused_plan_changes_nothing(
    make_model: Callable[..., Any], token_ids: torch.Tensor
) -> None:
    model = adapt_model(make_model("qwen2_moe"))
    logits = model.model(token_ids).logits
    good = make_plan(model, [range(4), range(4)])

    with pytest.raises(PlanError, match="layer 2 must keep at least top_k=3 experts, got 2"):
        apply_plan(model, make_plan(model, [range(4), range(2)]))
    other = adapt_model(make_model("qwen2_moe", seed=1))
    with pytest.raises(PlanError, match="made for this checkpoint"):
        apply_plan(other, good)

    assert torch.equal(model.model(token_ids).logits, logits)
    assert other.experts_per_layer == (8, 8)
