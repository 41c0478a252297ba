"""fisher: a linear head per layer that knows what leaving experts out would cost a token.

Heads foresee what n experts would cost the token (`edgemoe.allocate.costs`), and one price
per expert, the same for all layers and tokens, brings the mean to what was asked ::

    n_i = argmin_n (W x_i + b)_n + price n

The answer has the form of Ada-K's heads (https://arxiv.org/abs/2410.10456) and costs the device
as much; nothing is trained by trial, so nothing is drawn, and layers share experts out among
themselves as tokens do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.allocate.budget import check_mean, default_mean
from edgemoe.allocate.costs import check_model, fit_heads, run_with
from edgemoe.allocate.rollout import reward_of, see_states
from edgemoe.errors import AllocationError
from edgemoe.models.k_policy import following, most_slots

if TYPE_CHECKING:
    from edgemoe.k_rule import KRule
    from edgemoe.oracle.oracle import LayerOracle

# Tokens that the price is found on.
_PRICED_TOKENS = 4096
# Standard errors that a gain has to be above 0.
_CHANCE = 1.96


def fisher(
    oracle: LayerOracle,
    mean_k: float | None,
    seed: int,
    *,
    tokens: int = 16384,
    ridge: float = 0.0,
    k_max: int = 0,
) -> tuple[KRule, ...]:
    """Fit a head for each layer.

    Args:
        oracle: The model, in memory whole, and the task's tokens.
        mean_k: Experts per token and layer to hold, in [1, k_max]; two thirds of top_k where it
            is None.
        seed: Not used: the policy has no chance in it.
        tokens: How many tokens to fit to, in [1, inf).
        ridge: r, over the mean square of what routers see, in (0, inf); 0 chooses it.
        k_max: Most experts of a token; the model is run with that many, and costs are against
            that. 0 for twice the router's top_k where the model foresees tokens better with as
            many, by more than chance, and for top_k where it does not.

    Returns:
        A rule for each MoE layer.

    Raises:
        AllocationError: The mean or an option is out of range, a router follows no known rule,
            or the model answers NaN or infinity.
        StreamingError: The model is larger than memory: gradients go through all of it.
    """
    del seed
    check_model(oracle, "fisher")
    layers = oracle.moe.layers
    if k_max < 0:
        raise AllocationError(f"k_max must be in [0, inf), got {k_max}.")
    if k_max:
        most = [min(k_max, most_slots(layer)) for layer in layers]
    else:
        most = _choose_most(oracle)
    wanted = check_mean(default_mean(layers) if mean_k is None else mean_k, most)
    heads = fit_heads(oracle, most, "fisher", tokens=tokens, ridge=ridge)
    heads.tilt(see_states(oracle.moe, oracle.fewer(_PRICED_TOKENS).windows), wanted)
    return heads.rules()


def _choose_most(oracle: LayerOracle) -> list[int]:
    """Choose the most experts that a token may use: more than `top_k` where that helps."""
    layers = oracle.moe.layers
    own = [layer.top_k for layer in layers]
    twice = [min(2 * layer.top_k, most_slots(layer)) for layer in layers]
    few = oracle.fewer(_PRICED_TOKENS)
    windows = [window for window in few.windows if len(window.ids) > 1]
    if twice == own or not windows:
        return own

    def gain() -> float:
        with following(oracle.moe, run_with(layers, twice)):
            gained = reward_of(oracle.moe, windows)
        gained = (gained - reward_of(oracle.moe, windows)).double()
        return float(gained.mean() - _CHANCE * gained.std() / len(gained) ** 0.5)

    return twice if oracle.once(("better with", *twice), gain) > 0 else own
