"""fisher: costs against runs with fewer experts, and regression against scipy's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import lstsq
from torch.nn import functional

from edgemoe.allocate.costs import Ridge, Sums, choose_ridge, costs_of, sum_costs
from edgemoe.allocate.registry import allocate
from edgemoe.allocate.rollout import see_states
from edgemoe.allocate.usage import count_experts
from edgemoe.calibrate.sample import Window
from edgemoe.errors import AllocationError
from edgemoe.k_policy import KPolicy
from edgemoe.k_rule import KRule
from edgemoe.models import limit_k
from edgemoe.models.k_policy import following
from edgemoe.oracle.gradients import take_gradients
from tests.edgemoe.tiny_oracle import oracle_over

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.oracle import LayerOracle


def output_of(model: MoeModel, window: Window, place: int, k: int) -> torch.Tensor:
    """What a layer's experts give when it alone has k of them."""
    found: list[torch.Tensor] = []
    caps = [layer.top_k for layer in model.layers]
    caps[place] = k
    hook = model.layers[place].experts.register_forward_hook(
        lambda _, __, output: found.append(output)
    )
    with torch.no_grad(), limit_k(model, caps):
        model.model(input_ids=torch.tensor([window.ids]), use_cache=False)
    hook.remove()
    return found[0]


def slope(
    model: MoeModel, window: Window, place: int, token: int, change: torch.Tensor
) -> float:
    """How the loss changes along a change of one token's output of a layer."""
    step = torch.zeros((), requires_grad=True)

    def hook(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        along = torch.zeros_like(output)
        along[token] = change
        return output + step * along

    handle = model.layers[place].experts.register_forward_hook(hook)
    ids = torch.tensor([window.ids])
    logits = model.model(input_ids=ids, use_cache=False).logits
    functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
    handle.remove()
    assert step.grad is not None
    return float(step.grad)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "glm4_moe"])
def test_costs_are_squares_of_what_fewer_experts_do(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    oracle = make_oracle(family)
    model, window = oracle.moe, oracle.windows[1]
    before = {name: tensor.clone() for name, tensor in model.model.state_dict().items()}
    calls = take_gradients(model, window)
    assert all(torch.equal(t, before[name]) for name, t in model.model.state_dict().items())
    for place, call in enumerate(calls):
        top_k = model.layers[place].top_k
        costs = costs_of(call, top_k)
        assert costs.shape == (len(window.ids), top_k)
        assert (costs[:, -1] == 0).all()
        whole = output_of(model, window, place, top_k)
        for k in range(1, top_k):
            fewer = output_of(model, window, place, k)
            for token in (0, 2, len(window.ids) - 2):
                change = (fewer - whole)[token]
                expected = 0.5 * slope(model, window, place, token, change) ** 2
                assert costs[token, k - 1] == pytest.approx(expected, rel=1e-2, abs=1e-9)
    # The last token's next one is not known.
    assert all(costs_of(call, 3)[-1].max() == 0 for call in calls[-1:])


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_more_experts_than_top_k_are_what_fewer_are_measured_against(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    oracle = make_oracle(family)
    model = oracle.moe
    policy = allocate(oracle, "fisher", task="t", mean_k=3, options={"k_max": 5})
    assert [rule.slots for rule in policy.rules] == [5] * len(model.layers)
    with following(model, policy):
        counts = count_experts(model, oracle.windows)
    assert counts.mean() == pytest.approx(3, abs=0.2)
    assert counts.max() > 3
    layers = tuple(layer.index for layer in model.layers)
    whole = KPolicy(name="fixed", layers=layers, rules=(KRule(slots=5),) * len(layers))
    window = oracle.windows[1]
    with following(model, whole):
        (call, *_) = take_gradients(model, window)
        outputs = [output_of(model, window, 0, k) for k in (2, 5)]
    costs = costs_of(call, 5)
    assert costs.shape == (len(window.ids), 5)
    gradient = call.gradient.double()
    expected = 0.5 * ((outputs[0] - outputs[1]).double() * gradient).sum(dim=-1) ** 2
    np.testing.assert_allclose(costs[:-1, 1], expected[:-1].numpy(), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("told", [4, 2])
def test_tokens_may_use_more_where_that_foresees_them_better(
    make_oracle: Callable[..., LayerOracle], told: int
) -> None:
    oracle = make_oracle("mixtral", num_experts_per_tok=2)
    model = oracle.moe
    layers = tuple(layer.index for layer in model.layers)
    teller = KPolicy(name="fixed", layers=layers, rules=(KRule(slots=told),) * len(layers))
    random = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 96, (16, 1), generator=random)
    with torch.no_grad(), following(model, teller):
        for _ in range(40):
            likely = model.model(input_ids=ids, use_cache=False).logits[:, -1].softmax(dim=-1)
            ids = torch.cat([ids, torch.multinomial(likely, 1, generator=random)], dim=1)
    oracle.windows = tuple(
        Window(line=line, start=0, ids=row) for line, row in enumerate(ids.tolist(), start=1)
    )
    policy = allocate(oracle, "fisher", task="t", mean_k=1.5)
    assert {rule.slots for rule in policy.rules} == {told}


def regress(
    states: NDArray[np.float64], costs: NDArray[np.float64], ridge: float
) -> NDArray[np.float64]:
    """Ridge regression as least squares with a row more for each weight."""
    centred = states - states.mean(axis=0)
    size = states.shape[1]
    held = np.sqrt(ridge * np.square(centred).sum() / size)
    rows = np.vstack([centred, held * np.eye(size)])
    targets = np.vstack([costs - costs.mean(axis=0), np.zeros((size, costs.shape[1]))])
    weights = lstsq(rows, targets)[0]
    return np.vstack([weights, costs.mean(axis=0) - states.mean(axis=0) @ weights])


def sums_of(states: NDArray[np.float64], costs: NDArray[np.float64]) -> Sums:
    sums = Sums.zeros(states.shape[1], costs.shape[1])
    for half in range(2):
        sums.add(states[half::2].astype(np.float32), costs[half::2])
    return sums


@settings(max_examples=30)
@given(st.integers(0, 999), st.sampled_from([0.1, 1.0, 30.0, 1e4]))
def test_weights_are_those_of_least_squares(seed: int, ridge: float) -> None:
    random = np.random.default_rng(seed)
    states = random.normal(3, 1, (40, 5)).astype(np.float32).astype(np.float64)
    costs = np.abs(states @ random.normal(size=(5, 3))) + random.normal(size=(40, 3)) ** 2
    sums = sums_of(states, costs)
    weights = Ridge(sums).weights(ridge)
    np.testing.assert_allclose(weights, regress(states, costs, ridge), rtol=1e-6, atol=1e-8)
    rows = np.pad(states, ((0, 0), (0, 1)), constant_values=1)
    error = np.square(rows @ weights - costs).sum()
    assert sums.error(weights) == pytest.approx(error, rel=1e-9)


def test_heads_are_held_back_as_the_other_half_says() -> None:
    random = np.random.default_rng(0)
    true = random.normal(size=(20, 3))

    def half(noise: float) -> list[Sums]:
        states = random.normal(size=(60, 20))
        return [sums_of(states, states @ true + noise * random.normal(size=(60, 3)))]

    # What is heard clearly is believed, what is noise is not.
    assert choose_ridge((half(0.01), half(0.01))) == 0.1
    assert choose_ridge((half(100.0), half(100.0))) >= 10
    assert choose_ridge((half(0.01), [Sums.zeros(20, 3)])) == 10


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
@pytest.mark.parametrize("mean_k", [1.5, 2.25, 3.0])
def test_tokens_use_as_many_experts_as_asked(
    make_oracle: Callable[..., LayerOracle], family: str, mean_k: float
) -> None:
    oracle = make_oracle(family)
    policy = allocate(oracle, "fisher", task="t", mean_k=mean_k)
    assert policy == allocate(oracle, "fisher", task="t", mean_k=mean_k)
    assert policy.provenance["options"] == {"tokens": 16384, "ridge": 0.0, "k_max": 0}
    with following(oracle.moe, policy):
        counts = count_experts(oracle.moe, oracle.windows)
    assert counts.mean() == pytest.approx(mean_k, abs=0.2)
    assert 1 <= counts.min() <= counts.max() <= 3


def test_layers_and_tokens_that_lose_most_keep_most(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral")
    # Heads that are not held back at all know the costs of 50 tokens by heart.
    policy = allocate(oracle, "fisher", task="t", mean_k=2, options={"ridge": 1e-9})
    with following(oracle.moe, policy):
        counts = count_experts(oracle.moe, oracle.windows)[:, 0]
    known = [take_gradients(oracle.moe, window)[0] for window in oracle.windows]
    costs = np.concatenate([costs_of(call, 3) for call in known])
    least = costs[counts == 1, 0].mean()
    assert costs[counts == 3, 0].mean() > 2 * least


def test_what_cannot_be_decided_is_refused(make_oracle: Callable[..., LayerOracle]) -> None:
    oracle = make_oracle("mixtral")
    for options, mean_k, message in (
        ({"tokens": 0}, None, "tokens must be"),
        ({"ridge": -1.0}, None, "ridge must be"),
        ({"ridge": float("nan")}, None, "ridge must be"),
        ({}, 3.5, r"--mean-k must be in \[1, 3\]"),
    ):
        with pytest.raises(AllocationError, match=message):
            allocate(oracle, "fisher", task="t", mean_k=mean_k, options=options)
    oracle.windows = tuple(replace(window, ids=window.ids[:1]) for window in oracle.windows)
    with pytest.raises(AllocationError, match="two tokens of a line or more"):
        sum_costs(oracle, [3] * len(oracle.moe.layers))


def test_the_last_token_of_a_line_tells_nothing(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral")
    halves = sum_costs(oracle, [3] * len(oracle.moe.layers))
    for one, other in zip(*halves, strict=True):
        seen = one.inputs[-1, -1] + other.inputs[-1, -1]
        assert seen == sum(len(window.ids) - 1 for window in oracle.windows)


@pytest.mark.parametrize("family", ["mixtral", "gemma4_text", "zaya"])
def test_heads_are_fitted_to_what_routers_see_when_tokens_run(family: str) -> None:
    """Some routers transform their input, and experts are given something else."""
    oracle = oracle_over(family, (12,))
    window = oracle.windows[0]
    fitted = torch.stack([call.router_hidden for call in take_gradients(oracle.moe, window)])
    torch.testing.assert_close(fitted, see_states(oracle.moe, [window]))
