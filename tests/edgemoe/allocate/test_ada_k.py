"""The training of allocators against formulas, a bandit with a known answer, and itself."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from edgemoe.allocate import ppo
from edgemoe.allocate.cumulative import cumulative_of, find_share
from edgemoe.allocate.heads import Heads
from edgemoe.allocate.ppo import PpoOptions, improve, loss_of, train
from edgemoe.allocate.registry import allocate
from edgemoe.allocate.rollout import Rollout, draw, reward_of, see_states
from edgemoe.allocate.usage import count_experts
from edgemoe.allocate.warm import warm_up
from edgemoe.errors import AllocationError
from edgemoe.evaluate.scorer import Request
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.k_policy import KPolicy
from edgemoe.models.k_policy import following
from edgemoe.recover.state import TrainingState
from edgemoe.resume import WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models.contract import MoeModel
    from edgemoe.oracle.oracle import LayerOracle


def options_of(**changes: Any) -> PpoOptions:
    given: dict[str, Any] = {
        "steps": 6,
        "batch_tokens": 20,
        "passes": 2,
        "learning_rate": 0.01,
        "clip": 0.2,
        "gamma": 1.0,
        "regulariser": 0.003,
        "mean_k": None,
        "seed": 0,
    }
    return PpoOptions(**{**given, **changes})


def random_heads(slots: tuple[int, ...], hidden: int, seed: int = 0) -> Heads:
    heads = Heads.zeros(slots, hidden)
    with torch.no_grad():
        heads.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return heads


def policy_of(model: MoeModel, heads: Heads) -> KPolicy:
    layers = tuple(layer.index for layer in model.layers)
    return KPolicy(name="ada-k", layers=layers, rules=heads.rules())


@pytest.mark.parametrize("slots", [(4, 4), (4, 2)])
def test_the_loss_is_the_papers(slots: tuple[int, ...]) -> None:
    heads = random_heads(slots, 6)
    random = np.random.Generator(np.random.PCG64(1))
    states = random.normal(size=(2, 5, 6)).astype(np.float32)
    numbers = np.stack([random.integers(0, most, 5) for most in slots])
    advantages = random.normal(size=(2, 5)).astype(np.float32)
    before = np.log(random.uniform(0.1, 0.9, (2, 5))).astype(np.float32)
    total = 0.0
    weight = heads.weight.detach().double().numpy()
    for layer, most in enumerate(slots):
        for token in range(5):
            scores = weight[layer, :most, :-1] @ states[layer, token].astype(np.float64)
            scores += weight[layer, :most, -1]
            likely = np.exp(scores - scores.max())
            likely /= likely.sum()
            ratio = likely[numbers[layer, token]] / math.exp(before[layer, token])
            gain = min(
                ratio * advantages[layer, token],
                np.clip(ratio, 0.8, 1.2) * advantages[layer, token],
            )
            dear = sum((n + 1) * share for n, share in enumerate(likely))
            total += (0.05 * dear - gain) / 10
    rollout = Rollout(torch.from_numpy(states), torch.from_numpy(numbers), torch.zeros(5))
    found = loss_of(
        heads, rollout, torch.from_numpy(advantages), torch.from_numpy(before), 0.05, 0.2
    )
    assert found.item() == pytest.approx(total, rel=1e-5)


def test_heads_learn_what_is_rewarded_and_save_where_nothing_is() -> None:
    """Layer 0 is paid for three experts where a feature is positive, else for one."""
    heads = Heads.zeros((3, 3), 4)
    options = options_of(learning_rate=0.02, passes=4)
    optimizer = torch.optim.AdamW([heads.weight], lr=options.learning_rate)
    random = torch.Generator().manual_seed(0)
    for _ in range(250):
        states = torch.randn(2, 64, 4, generator=random)
        with torch.no_grad():
            likely = heads.log_probabilities(states).exp()
        numbers = torch.multinomial(likely.flatten(0, 1), 1, generator=random).reshape(2, 64)
        wanted = torch.where(states[0, :, 0] > 0, 2, 0)
        gained = (numbers[0] == wanted).float() - 0.5
        improve(heads, Rollout(states, numbers, gained), gained, optimizer, 0.1, options)
    states = torch.randn(2, 1000, 4, generator=random)
    found = heads.log_probabilities(states).argmax(dim=-1)
    right = found[0] == torch.where(states[0, :, 0] > 0, 2, 0)
    assert right.float().mean() > 0.95
    # Layer 1 is never paid for: what is dear goes.
    assert (found[1] == 0).float().mean() > 0.8


def test_later_layers_earn_more_with_gamma_below_one() -> None:
    moved = {}
    for gamma in (1.0, 0.5):
        heads = Heads.zeros((2, 2, 2), 3)
        # Without Adam's scaling the step is the gradient.
        optimizer = torch.optim.SGD([heads.weight], lr=1.0)
        states = torch.ones(3, 4, 3)
        gained = torch.tensor([3.0, 3.0, 1.0, 1.0])
        rollout = Rollout(states, torch.tensor([[1, 1, 0, 0]] * 3), torch.zeros(4))
        improve(heads, rollout, gained, optimizer, 0.0, options_of(gamma=gamma, passes=1))
        moved[gamma] = heads.weight.detach()[:, 1, 0]
    assert (moved[1.0] > 0.1).all()
    assert torch.allclose(moved[1.0], moved[1.0][0].expand(3))
    expected = moved[1.0] * torch.tensor([0.25, 0.5, 1.0])
    assert torch.allclose(moved[0.5], expected)


def test_what_all_tokens_gain_moves_nothing() -> None:
    moved = []
    for common in (0.0, -7.0):
        heads = Heads.zeros((3, 3), 4)
        optimizer = torch.optim.SGD([heads.weight], lr=1.0)
        random = torch.Generator().manual_seed(0)
        states = torch.randn(2, 16, 4, generator=random)
        numbers = torch.randint(0, 3, (2, 16), generator=random)
        gained = torch.randn(16, generator=random)
        rollout = Rollout(states, numbers, gained)
        improve(heads, rollout, gained + common, optimizer, 0.0, options_of(passes=1))
        moved.append(heads.weight.detach())
    assert torch.allclose(moved[0], moved[1], atol=1e-6)
    assert moved[0].abs().max() > 0.01


@pytest.mark.parametrize("family", ["glm4_moe", "mixtral"])
def test_rewards_are_log_probabilities_under_the_drawn_numbers(
    make_oracle: Callable[..., LayerOracle], family: str
) -> None:
    oracle = make_oracle(family)
    model, windows = oracle.moe, oracle.windows
    count = len(model.layers)
    # So steep that a draw always takes the most likely number.
    heads = random_heads((5,) * count, model.layers[0].hidden_size)
    with torch.no_grad():
        heads.weight.mul_(1e4)
    rollout = draw(model, windows, heads, torch.Generator().manual_seed(0))
    requests = [Request((w.ids[0],), (tuple(w.ids[1:]),)) for w in windows]
    plain = np.concatenate([row[0] for row in TorchScorer(model).score(requests)])
    np.testing.assert_allclose(reward_of(model, windows).numpy(), plain, atol=1e-5)
    with following(model, policy_of(model, heads)):
        scored = np.concatenate([row[0] for row in TorchScorer(model).score(requests)])
        used = count_experts(model, windows)
    np.testing.assert_allclose(rollout.rewards.numpy(), scored, atol=1e-5)
    lasts = np.cumsum([len(window.ids) for window in windows]) - 1
    expected = np.delete(used, lasts, axis=0).T - 1
    assert rollout.numbers.tolist() == expected.tolist()
    assert len(np.unique(expected)) > 1
    best = heads.log_probabilities(rollout.states).argmax(dim=-1)
    assert torch.equal(best, rollout.numbers)


def test_numbers_are_drawn_as_likely_as_heads_say(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral")
    heads = Heads.zeros((4,) * len(oracle.moe.layers), 32)
    drawn = [
        draw(oracle.moe, oracle.windows, heads, torch.Generator().manual_seed(seed)).numbers
        for seed in range(12)
    ]
    counts = torch.bincount(torch.stack(drawn).flatten(), minlength=4)
    shares = counts / counts.sum()
    assert shares.sub(0.25).abs().max() < 0.03
    assert not torch.equal(drawn[0], drawn[1])


def test_a_warm_up_learns_the_numbers_of_a_share(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral")
    model = oracle.moe
    heads = Heads.zeros((5,) * len(model.layers), 32)
    share = warm_up(oracle, heads, 2.5, epochs=300, learning_rate=0.02, seed=0)
    cumulative = cumulative_of(oracle, heads.slots)
    assert share == find_share(cumulative, 2.5)
    states = see_states(model, oracle.windows)
    found = heads.log_probabilities(states).argmax(dim=-1) + 1
    wanted = torch.from_numpy(np.stack([(layer < share).sum(axis=1) for layer in cumulative]))
    assert (found == wanted).float().mean() > 0.9
    assert float(found.float().mean()) == pytest.approx(2.5, abs=0.2)


def test_a_warm_up_by_costs_is_the_policy_that_foresees_them(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral")
    options = {"warm": "fisher", "steps": 0, "k_max": 4}
    made = allocate(oracle, "ada-k", task="t", mean_k=2, options=options)
    fisher = allocate(oracle, "fisher", task="t", mean_k=2, options={"k_max": 4})
    counts = []
    for policy in (made, fisher):
        with following(oracle.moe, policy):
            counts.append(count_experts(oracle.moe, oracle.windows))
    # A token on the edge between two numbers goes either way, by the rounding of the price.
    differences = np.abs(np.asarray(counts[0]) - np.asarray(counts[1]))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.01
    # Others than the likeliest numbers are drawn as well.
    rows = [rule.allocator for rule in made.rules if rule.allocator is not None]
    weight = torch.from_numpy(np.stack(rows))
    heads = Heads(torch.nn.Parameter(weight), (4,) * len(made.rules))
    states = see_states(oracle.moe, oracle.windows)
    likely = heads.log_probabilities(states).detach().exp().amax(dim=-1).mean()
    assert float(likely) == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("likely", [0.4, 0.7, 0.95])
def test_sharper_heads_want_the_same_and_doubt_less(likely: float) -> None:
    heads = random_heads((4, 3), 6)
    states = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(1))
    before = heads.log_probabilities(states)
    heads.sharpen(states, likely)
    after = heads.log_probabilities(states)
    assert torch.equal(before.argmax(dim=-1), after.argmax(dim=-1))
    found = after.detach().exp().amax(dim=-1).mean()
    assert float(found) == pytest.approx(likely, abs=1e-3)


@pytest.mark.parametrize("mean_k", [1.0, 1.7, 2.6, 3.5])
def test_a_tilt_brings_the_mean_where_it_is_asked(mean_k: float) -> None:
    heads = random_heads((4, 3), 6)
    states = torch.randn(2, 500, 6, generator=torch.Generator().manual_seed(1))
    before = heads.log_probabilities(states)
    price = heads.tilt(states, mean_k)
    after = heads.log_probabilities(states)
    found = after.argmax(dim=-1).float().mean().item() + 1
    assert found <= mean_k + 1e-6
    assert found == pytest.approx(mean_k, abs=0.01)
    # What a token wants beside another stays, but for the price.
    moved = (after - before)[0].diff(dim=-1)
    torch.testing.assert_close(moved, torch.full_like(moved, price), rtol=1e-3, atol=1e-3)


def test_an_interrupted_training_ends_with_the_same_bits(
    make_oracle: Callable[..., LayerOracle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = make_oracle("mixtral")
    asked: dict[str, Any] = {"steps": 5, "batch_tokens": 20, "warm_epochs": 2}

    def make(name: str) -> KPolicy:
        work = WorkDirectory(tmp_path / name)
        work.path.mkdir(exist_ok=True)
        return allocate(oracle, "ada-k", task="t", mean_k=2, options=asked, work=work)

    monkeypatch.setattr(ppo.train, "__kwdefaults__", {"checkpoint_seconds": 0.0})
    whole = make("whole")
    assert whole == allocate(oracle, "ada-k", task="t", mean_k=2, options=asked)
    assert whole != allocate(oracle, "ada-k", task="t", mean_k=2, options=asked, seed=1)

    calls = []

    def fail(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) in (2, 5):
            raise KeyboardInterrupt
        improve(*arguments)

    monkeypatch.setattr(ppo, "improve", fail)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            make("killed")
    assert make("killed") == whole
    assert len(calls) == 7


def test_what_is_gained_is_gained_over_the_routers_own_numbers(
    make_oracle: Callable[..., LayerOracle], monkeypatch: pytest.MonkeyPatch
) -> None:
    oracle = make_oracle("mixtral")
    heads = random_heads((4,) * len(oracle.moe.layers), 32)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def look(_: Heads, rollout: Rollout, gained: torch.Tensor, *__: object) -> None:
        seen.append((rollout.rewards, gained))

    monkeypatch.setattr(ppo, "improve", look)
    # All windows are drawn at once, in some order.
    train(oracle.moe, oracle.windows, heads, options_of(steps=1, batch_tokens=10**6))
    ((rewards, gained),) = seen
    order = ppo.choose(oracle.windows, 10**6, [0, 0])
    own = torch.cat([reward_of(oracle.moe, [oracle.windows[number]]) for number in order])
    torch.testing.assert_close(gained, rewards - own)


def test_the_likeliest_numbers_have_the_mean_that_was_asked_for(
    make_oracle: Callable[..., LayerOracle],
) -> None:
    oracle = make_oracle("mixtral")
    options = {"steps": 2, "k_max": 5, "learning_rate": 0.1, "batch_tokens": 20}
    made = allocate(oracle, "ada-k", task="t", mean_k=2.5, options=options)
    assert {rule.slots for rule in made.rules} == {5}
    with following(oracle.moe, made):
        counts = count_experts(oracle.moe, oracle.windows)
    assert counts.mean() == pytest.approx(2.5, abs=0.25)


def test_lambda_follows_the_mean_that_was_asked_for(
    make_oracle: Callable[..., LayerOracle], tmp_path: Path
) -> None:
    oracle = make_oracle("mixtral")
    found = {}
    for mean in (1.2, 3.8):
        state = TrainingState(WorkDirectory(tmp_path))
        state.progress = {}
        heads = Heads.zeros((4,) * len(oracle.moe.layers), 32)
        train(oracle.moe, oracle.windows, heads, options_of(mean_k=mean), state)
        found[mean] = state.progress["regulariser"]
    # Numbers are drawn around 2.5.
    assert found[1.2] > 0.003 > found[3.8]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"options": {"batch_tokens": 0}}, "batch_tokens must be"),
        ({"options": {"passes": 0}}, "passes must be"),
        ({"options": {"clip": 0.0}}, "clip must be"),
        ({"options": {"gamma": 1.5}}, "gamma must be"),
        ({"options": {"learning_rate": 2.0}}, "learning_rate must be"),
        ({"options": {"warm_rate": 0.0}}, "warm_rate must be"),
        ({"options": {"regulariser": -1.0}}, "regulariser must be"),
        ({"options": {"warm": "reap"}}, "warm must be one of top-p, fisher, got 'reap'"),
        ({"mean_k": 7}, r"--mean-k must be in \[1, 6\]"),
    ],
)
def test_what_makes_no_sense_is_refused(
    make_oracle: Callable[..., LayerOracle], asked: dict[str, Any], message: str
) -> None:
    with pytest.raises(AllocationError, match=message):
        allocate(make_oracle("mixtral"), "ada-k", task="t", **asked)
