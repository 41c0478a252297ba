"""ada-k: a linear head per layer says how many experts a token uses, trained by PPO.

Ada-K routing (https://arxiv.org/abs/2410.10456). The head of layer l sees what the router
sees::

    P_l = softmax(W_l x_l + b_l)          over 1 ... k_max experts

The model and its routers stay as they are. Heads are warmed up to what `top-p` would do
("P-Warm": cross-entropy to the smallest n that reaches a share p of the router probability, p
such that tokens use as many as asked), and then trained by PPO (`edgemoe.allocate.ppo`):
numbers are drawn for every token and layer, and what the drawn numbers do to the probability of
the next token, against the router's own top-k, rewards all layers of the token.

With `warm=fisher` the heads begin with what numbers of experts cost instead, which one
backward pass tells (`edgemoe.allocate.costs`): the paper's warm-up knows routers only.

What the paper leaves open is decided so (benchmarks/adaptive_k/ablation.py compares): gamma is
1, the clip 0.2, and in use the most likely number counts. With `mean_k` the weight of the
term that makes experts dear follows the mean of the drawn numbers, so that the mean stays
where it was asked, and at the end one bias for all layers brings the most likely numbers
there; without, it is the paper's constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.allocate.budget import check_mean
from edgemoe.allocate.heads import Heads
from edgemoe.allocate.ppo import PpoOptions, train
from edgemoe.allocate.rollout import see_states
from edgemoe.allocate.warm import warm_up, warm_up_by_costs
from edgemoe.errors import AllocationError
from edgemoe.models.k_policy import most_slots
from edgemoe.recover.state import TrainingState

if TYPE_CHECKING:
    from edgemoe.k_rule import KRule
    from edgemoe.oracle.oracle import LayerOracle
    from edgemoe.resume import WorkDirectory


_WARM = ("top-p", "fisher")
# As many as the policy `fisher` takes.
_FITTED_TOKENS = 16384


def ada_k(
    oracle: LayerOracle,
    mean_k: float | None,
    seed: int,
    work: WorkDirectory | None = None,
    *,
    k_max: int = 0,
    steps: int = 64,
    batch_tokens: int = 1024,
    passes: int = 2,
    learning_rate: float = 1e-4,
    clip: float = 0.2,
    gamma: float = 1.0,
    regulariser: float = 0.003,
    warm: str = "top-p",
    warm_epochs: int = 8,
    warm_tokens: int = 4096,
    warm_rate: float = 1e-3,
) -> tuple[KRule, ...]:
    """Train a head for each layer.

    Args:
        oracle: The model, in memory whole, and the task's tokens.
        mean_k: Experts per token and layer to hold, in [1, k_max]; None begins with the
            router's top_k, as the paper does, and goes where `regulariser` leads.
        seed: Of what is drawn.
        work: Where the training is kept; None keeps it nowhere.
        k_max: Most experts of a token; 0 for twice the router's top_k, where there are as many.
        steps: Draws of PPO; 0 leaves it at the warm-up.
        batch_tokens: Tokens of each draw.
        passes: Changes of the heads after each draw.
        learning_rate: Of AdamW, in PPO.
        clip: How far a pass may change how likely a number is, relative.
        gamma: What later layers' shares of a reward grow by, per layer, in (0, 1].
        regulariser: lambda: nats per token that an expert must be worth.
        warm: Where heads begin: `top-p` with the numbers that a share of the router probability
            gives, as in the paper, `fisher` with what numbers cost, as the policy of that name
            does.
        warm_epochs: Passes of the warm-up over its tokens, with `top-p`.
        warm_tokens: Tokens of the warm-up.
        warm_rate: Learning rate of AdamW in the warm-up, with `top-p`.

    Returns:
        A rule for each MoE layer.

    Raises:
        AllocationError: The mean or an option is out of range, or a router follows no known
            rule.
        StreamingError: The family cannot be run layer by layer.
    """
    for name, value in (
        ("batch_tokens", batch_tokens),
        ("passes", passes),
        ("warm_epochs", warm_epochs),
        ("warm_tokens", warm_tokens),
    ):
        if value < 1:
            raise AllocationError(f"{name} must be in [1, inf), got {value}.")
    for number, most_of, told in (
        (learning_rate, 1.0, "learning_rate must be in (0, 1]"),
        (warm_rate, 1.0, "warm_rate must be in (0, 1]"),
        (clip, 1.0, "clip must be in (0, 1]"),
        (gamma, 1.0, "gamma must be in (0, 1]"),
    ):
        if not 0 < number <= most_of:
            raise AllocationError(f"{told}, got {number:g}.")
    if regulariser < 0:
        raise AllocationError(f"regulariser must be in [0, inf), got {regulariser:g}.")
    if warm not in _WARM:
        raise AllocationError(f"warm must be one of {', '.join(_WARM)}, got {warm!r}.")
    layers = oracle.moe.layers
    most = [min(k_max or 2 * layer.top_k, most_slots(layer)) for layer in layers]
    own = sum(layer.top_k for layer in layers) / len(layers)
    begun = check_mean(min(own, sum(most) / len(most)) if mean_k is None else mean_k, most)
    heads = Heads.zeros(most, layers[0].router_inputs)
    state = None if work is None else TrainingState(work)
    fresh = state is None or not state.progress
    if fresh and warm == "fisher":
        warm_up_by_costs(oracle, heads, begun, tokens=warm_tokens, fitted_tokens=_FITTED_TOKENS)
    elif fresh:
        warm_up(
            oracle.fewer(warm_tokens),
            heads,
            begun,
            epochs=warm_epochs,
            learning_rate=warm_rate,
            seed=seed,
        )
    options = PpoOptions(
        steps=steps,
        batch_tokens=batch_tokens,
        passes=passes,
        learning_rate=learning_rate,
        clip=clip,
        gamma=gamma,
        regulariser=regulariser,
        mean_k=mean_k,
        seed=seed,
    )
    train(oracle.moe, oracle.windows, heads, options, state)
    if mean_k is not None:
        # Drawn numbers had that mean; the most likely ones need not.
        heads.tilt(see_states(oracle.moe, oracle.fewer(warm_tokens).windows), mean_k)
    return heads.rules()
