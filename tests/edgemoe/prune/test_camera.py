"""camera: energies of neurons against the formula in plain loops, and layer after layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgemoe.apply.expert_tensors import plan_tensors
from edgemoe.calibrate.collect import collect
from edgemoe.errors import PlanError
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.channels import count_mask, read_mask
from edgemoe.plans.plan import Plan
from edgemoe.prune.camera import energies
from edgemoe.prune.registry import count_for, make_plan, read_options
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from edgemoe.calibrate.statistics import Statistics
    from edgemoe.models.layers.layer import MoeLayer

WIDTH = 32


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """A function from a family to a tiny checkpoint and its statistics."""
    made: dict[str, tuple[Path, Statistics]] = {}

    def get(family: str) -> tuple[Path, Statistics]:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            # The name of the experts' width in some families, of dense layers in others.
            path = write_tiny_checkpoint(family, folder / "model", intermediate_size=WIDTH)
            random = np.random.Generator(np.random.PCG64(0))
            lines = [" ".join(f"w{i}" for i in random.integers(3, 96, 30)) for _ in range(4)]
            file = folder / "task.jsonl"
            file.write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
            task = TaskFile.load("t", file)
            made[family] = path, collect(load_model(path), [task], load_tokenizer(path))
        return made[family]

    return get


def plan_with(path: Path, statistics: Statistics, keep: float, **options: Any) -> Plan:
    def reopen(windows: Sequence[Any]) -> LayerOracle:
        return LayerOracle(InMemoryLayers(load_model(path)), windows)

    counts = count_for("camera", statistics.shape, keep)
    return make_plan(statistics, "t", "camera", counts, options=options, open_oracle=reopen)


def neuron(layer: MoeLayer, expert: int, n: int, x: np.ndarray[Any, Any]) -> tuple[float, Any]:
    """What a neuron gives for one input, and its down column, in float64."""
    experts: Any = layer.experts
    if layer.layout.has_bias:
        # gpt_oss: [inputs, outputs], gate and up alternate, constants of its own.
        weight = experts.gate_up_proj[expert].double().numpy()
        bias = experts.gate_up_proj_bias[expert].double().numpy()
        gate = x @ weight[:, 2 * n] + bias[2 * n]
        up = x @ weight[:, 2 * n + 1] + bias[2 * n + 1]
        gate, up = min(gate, 7.0), max(min(up, 7.0), -7.0)
        value = (up + 1) * gate / (1 + math.exp(-1.702 * gate))
        return value, experts.down_proj[expert, n].double().numpy()
    column = experts.down_proj[expert, :, n].double().numpy()
    if not layer.layout.has_gate:
        up = x @ experts.up_proj[expert, n].double().numpy()
        return max(up, 0.0) ** 2, column
    weight = experts.gate_up_proj[expert].double().numpy()
    gate, up = x @ weight[n], x @ weight[WIDTH + n]
    return gate / (1 + math.exp(-gate)) * up, column


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_energies_are_the_formula(family: str, measured: Callable[[str], Any]) -> None:
    path, statistics = measured(family)
    oracle = LayerOracle(InMemoryLayers(load_model(path)), statistics.task("t").windows)
    view = next(iter(oracle.walk("test")))
    hidden = view.hidden.double().numpy()
    for alpha in (0.0, 0.3, 1.0):
        found = energies(view, alpha)
        assert found.shape == (8, WIDTH)
        for expert in range(0, 8, 3):
            for n in (0, 1, 17, WIDTH - 1):
                values, column = [], np.zeros(1)
                for token, chosen in enumerate(view.routing.indices.tolist()):
                    if expert in chosen:
                        gate = float(view.routing.weights[token, chosen.index(expert)])
                        value, column = neuron(view.layer, expert, n, hidden[token])
                        values.append(gate * value)
                total = sum(value**2 for value in values)
                largest = max((value**2 for value in values), default=0.0)
                want = ((1 - alpha) * total + alpha * largest) * sum(column**2)
                assert math.isclose(found[expert, n], want, rel_tol=1e-4, abs_tol=1e-12)


@pytest.mark.parametrize("widths", ["equal", "ragged"])
def test_each_layer_is_judged_on_what_the_pruned_ones_return(
    widths: str, measured: Callable[[str], Any]
) -> None:
    path, statistics = measured("qwen2_moe")
    plan = plan_with(path, statistics, 0.5, widths=widths, alpha=0.25)
    assert Plan.from_json(plan.to_json()) == plan
    assert plan.options["keep_neurons"] == [16] * 4
    assert (plan.options["widths"], plan.options["alpha"]) == (widths, 0.25)

    oracle = LayerOracle(InMemoryLayers(load_model(path)), statistics.task("t").windows)
    different = False
    for layer_plan, view in zip(plan.layers, oracle.walk("test"), strict=True):
        scores = energies(view, 0.25)
        kept = np.zeros_like(scores, dtype=bool)
        for expert, planned in enumerate(layer_plan.experts):
            kept[expert, list(read_mask(str(planned.neurons)))] = True
        if widths == "equal":
            assert (kept.sum(axis=1) == 16).all()
            for row, chosen in zip(scores, kept, strict=True):
                assert row[chosen].min() >= row[~chosen].max()
        else:
            assert kept.sum() == 8 * 16
            assert kept.sum(axis=1).min() >= 1
            forced = kept.sum(axis=1) == 1
            assert scores[~forced][kept[~forced]].min() >= scores[~kept].max()
            different |= len(set(kept.sum(axis=1).tolist())) > 1
        view.go_on_with(plan_tensors(view.layer, layer_plan))
    assert different == (widths == "ragged")
    assert plan.prunes_width


def test_a_model_larger_than_memory_gives_the_same_plan(measured: Callable[[str], Any]) -> None:
    path, statistics = measured("qwen2_moe")
    counts = count_for("camera", statistics.shape, 0.5)
    streamed = make_plan(
        statistics,
        "t",
        "camera",
        counts,
        open_oracle=lambda windows: LayerOracle(StreamedLayers(open_streamed(path)), windows),
    )
    assert streamed.to_json() == plan_with(path, statistics, 0.5).to_json()
    assert {count_mask(str(e.neurons)) for e in streamed.layers[0].experts} == {16}


def test_options_are_checked(measured: Callable[[str], Any]) -> None:
    path, statistics = measured("qwen2_moe")
    assert read_options("camera", ["alpha=0.5", "widths=ragged", "tokens=64"]) == {
        "alpha": 0.5,
        "widths": "ragged",
        "tokens": 64,
    }
    for text in ("alpha=much", "alpha=nan"):
        with pytest.raises(PlanError, match="option alpha of camera must be a number, got"):
            read_options("camera", [text])
    with pytest.raises(PlanError, match=r"alpha must be in \[0, 1\], got 1.5"):
        plan_with(path, statistics, 0.5, alpha=1.5)
    with pytest.raises(PlanError, match="widths must be equal or ragged, got 'even'"):
        plan_with(path, statistics, 0.5, widths="even")
    with pytest.raises(PlanError, match="there must be one width for each of the 4 MoE layers"):
        make_plan(statistics, "t", "camera", [16])


def test_neurons_without_a_token_keep_their_order(measured: Callable[[str], Any]) -> None:
    path, statistics = measured("qwen2_moe")
    oracle = LayerOracle(InMemoryLayers(load_model(path)), statistics.task("t").windows)
    view = next(iter(oracle.walk("test")))
    view.routing.indices[view.routing.indices == 2] = 8
    found = energies(view, 1.0)
    assert not found[2].any()
    assert torch.tensor(found[[0, 1, 3]]).gt(0).all()
