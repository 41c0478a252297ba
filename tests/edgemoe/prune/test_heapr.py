"""heapr: importances against gradients of copies of every expert, taken by torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from edgemoe.calibrate.sample import Window
from edgemoe.decompose.shared_basis import share_basis
from edgemoe.errors import StreamingError
from edgemoe.layerwise.provider import InMemoryLayers, StreamedLayers
from edgemoe.models import load_model
from edgemoe.models.layers.shared_basis import to_shared_basis
from edgemoe.models.opening import open_streamed
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe.oracle.oracle import LayerOracle
from edgemoe.plans.channels import count_mask, read_mask
from edgemoe.prune.heapr import heapr, importances
from edgemoe.prune.widths import count_widths

if TYPE_CHECKING:
    from pathlib import Path

    from edgemoe.models.contract import MoeModel
    from edgemoe.plans.plan import LayerPlan

EXPERTS, WIDTH = 8, 32


def draw_windows(lengths: tuple[int, ...]) -> tuple[Window, ...]:
    random = np.random.Generator(np.random.PCG64(1))
    return tuple(
        Window(line=n + 1, start=0, ids=random.integers(3, VOCAB_SIZE, length).tolist())
        for n, length in enumerate(lengths)
    )


WINDOWS = draw_windows((12, 1, 9))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("heapr")
    families = ("qwen2_moe", "gpt_oss")
    sizes: dict[str, Any] = {"num_hidden_layers": 2, "intermediate_size": WIDTH}
    return {f: write_tiny_checkpoint(f, folder / f, **sizes) for f in families}


def brute_force(model: MoeModel) -> list[torch.Tensor]:
    """s_k with M written out, from a forward that keeps every expert's output for itself."""
    found = []
    records: list[list[list[tuple[Any, Any]]]] = [
        [[] for _ in range(EXPERTS)] for _ in model.layers
    ]

    def watch(number: int) -> Any:
        layer = model.layers[number]
        experts: Any = layer.experts

        def forward(hidden: Any, indices: Any, weights: Any) -> Any:
            output = torch.zeros_like(hidden)
            for expert in range(EXPERTS):
                token, slot = torch.where(indices == expert)
                x = hidden[token]
                if layer.layout.is_transposed:
                    units = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    h = experts._apply_gate(units)
                    y = h @ experts.down_proj[expert] + experts.down_proj_bias[expert]
                else:
                    h = experts._apply_gate(x @ experts.gate_up_proj[expert].T)
                    y = h @ experts.down_proj[expert].T
                # A leaf of its own, so that torch tells the gradient exactly here.
                probe = torch.zeros_like(y, requires_grad=True)
                records[number][expert].append((h.detach(), probe))
                output = output.index_add(0, token, (y + probe) * weights[token, slot, None])
            return output

        return forward

    for number, layer in enumerate(model.layers):
        layer.experts.forward = watch(number)
    seen = 0
    for window in WINDOWS:
        seen += len(window.ids)
        ids = torch.tensor([window.ids])
        if len(window.ids) > 1:
            logits = model.model(input_ids=ids, use_cache=False).logits
            loss: Any = functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum")
            loss.backward()
    for number, layer in enumerate(model.layers):
        scores = torch.zeros(EXPERTS, WIDTH, dtype=torch.float64)
        for expert in range(EXPERTS):
            pairs = records[number][expert]
            h = torch.cat([h for h, _ in pairs]).double()
            g = torch.cat([p.grad if p.grad is not None else p for _, p in pairs]).double()
            moments = g.T @ g / seen
            experts: Any = layer.experts
            down = experts.down_proj[expert].double()
            for k in range(WIDTH):
                w = down[k] if layer.layout.is_transposed else down[:, k]
                scores[expert, k] = (h[:, k] ** 2).sum() / seen * (w @ moments @ w)
        del layer.experts.forward
        found.append(scores)
    return found


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_importances_are_those_of_autograd(family: str, paths: dict[str, Path]) -> None:
    model = load_model(paths[family])
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}

    found = importances(model, WINDOWS)

    assert all(torch.equal(t, before[name]) for name, t in model.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())
    for one, other in zip(found, brute_force(load_model(paths[family])), strict=True):
        want = other.detach().numpy()
        assert want.max() > 0
        np.testing.assert_allclose(one, want, rtol=2e-3, atol=1e-6 * want.max())


def test_neurons_between_shared_bases_are_scored_in_the_hidden_size(
    paths: dict[str, Path],
) -> None:
    model, same = load_model(paths["qwen2_moe"]), load_model(paths["qwen2_moe"])
    for layer in model.layers:
        # Bases of full rank that turn the space: the model says the same.
        to_shared_basis(layer, share_basis(layer, layer.hidden_size).tensors)
    for one, other in zip(importances(model, WINDOWS), importances(same, WINDOWS), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-2, atol=1e-4 * other.max())


def decide(path: Path, keep: float, widths: str) -> tuple[LayerPlan, ...]:
    model = load_model(path)
    return heapr(
        LayerOracle(InMemoryLayers(model), WINDOWS),
        None,  # type: ignore[arg-type]  # it reads no statistics
        model.shape,
        count_widths(model.shape, keep),
        0,
        tokens=64,
        widths=widths,
    )


def test_the_order_of_all_layers_gives_their_widths(paths: dict[str, Path]) -> None:
    path = paths["qwen2_moe"]
    scores = importances(load_model(path), WINDOWS)
    total = 2 * EXPERTS * 16

    ragged = decide(path, 0.5, "ragged")

    kept = [
        [set(read_mask(e.neurons)) if e.neurons else set(range(WIDTH)) for e in plan.experts]
        for plan in ragged
    ]
    assert sum(len(neurons) for layer in kept for neurons in layer) == total
    best = sorted(
        ((scores[n][e, k], n, e, k) for n, e, k in np.ndindex(2, EXPERTS, WIDTH)), reverse=True
    )
    inside = {(n, e, k) for _, n, e, k in best[:total]}
    found = {
        (n, e, k) for n, layer in enumerate(kept) for e, ks in enumerate(layer) for k in ks
    }
    # All experts keep a neuron, even those that no token reached.
    assert len(found - inside) <= sum(len(ks) == 1 for layer in kept for ks in layer)

    equal = decide(path, 0.5, "equal")

    widths = [{count_mask(e.neurons) if e.neurons else WIDTH for e in p.experts} for p in equal]
    assert all(len(found) == 1 for found in widths)
    one, other = (found.pop() for found in widths)
    assert one % 8 == other % 8 == 0
    assert 32 - 8 < one + other <= 32
    shares = [sum(n == layer for _, n, _, _ in best[:total]) / EXPERTS for layer in (0, 1)]
    assert abs(one - shares[0]) < 8
    assert abs(other - shares[1]) < 8
    for plan, layer_scores in zip(equal, scores, strict=True):
        for expert, row in zip(plan.experts, layer_scores, strict=True):
            if expert.neurons:
                chosen = list(read_mask(expert.neurons))
                assert row[chosen].min() >= np.delete(row, chosen).max()


def test_a_model_larger_than_memory_is_refused(paths: dict[str, Path]) -> None:
    streamed = open_streamed(paths["qwen2_moe"])
    oracle = LayerOracle(StreamedLayers(streamed), WINDOWS)
    with pytest.raises(StreamingError, match=r"heapr, which takes gradients .* whole model"):
        heapr(oracle, None, streamed.moe.shape, (16, 16), 0)  # type: ignore[arg-type]
