"""owl: layers with more outliers among their weights keep more experts (Yin et al., 2023).

https://arxiv.org/abs/2310.05175 makes the sparsity of layer l proportional to 1 - D_l, with D_l
as in `edgemoe.oracle.outliers`, within [S - lambda, S + lambda] and with S for its mean.
As in the authors' code D_l is first stretched to a range of 2 * lambda; then it is moved until
the mean is S, and here cut off at both ends of the interval, which their code leaves out. With
n_l experts in layer l, u_l of them kept without OWL, and c such that the total stays::

    kept_l = u_l + n_l * clip(2 * lambda * (D_l - min D) / (max D - min D) + c, lo_l, hi_l)

where lo_l and hi_l are -lambda and +lambda, nearer to 0 where the layer would keep fewer
experts than its router needs or more than it has. Whole experts are shared out by largest
remainder.

M = 5 and lambda = 0.08 are the authors' settings for LLaMA. They prune single weights: with 16
experts a step is 0.06, so that a layer gains or loses one or two experts at most, with 8 one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgemoe.errors import PlanError
from edgemoe.oracle.oracle import DEFAULT_TOKENS
from edgemoe.oracle.outliers import outlier_ratios

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from edgemoe.models.shapes import LayerShape, ModelShape
    from edgemoe.oracle.oracle import LayerOracle

UNIFORM, OWL = "uniform", "owl"

# Options of every method that keeps as many experts of a layer as it is told.
LAYER_OPTIONS: dict[str, Any] = {"layers": UNIFORM, "owl_multiple": 5.0, "owl_range": 0.08}

# Of the order of rounding in a share of experts.
_NOISE = 1e-9


@dataclass(frozen=True, kw_only=True)
class Owl:
    """OWL's settings.

    Attributes:
        multiple: M, how many times the mean an outlier is, in (0, inf).
        spread: lambda, by which share of its experts a layer may keep more or fewer, in [0, 1].
    """

    multiple: float
    spread: float

    def __post_init__(self) -> None:
        if not 0 < self.multiple < math.inf:
            raise PlanError(f"owl_multiple must be in (0, inf), got {self.multiple:g}.")
        if not 0 <= self.spread <= 1:
            raise PlanError(
                f"owl_range must be a share of a layer's experts in [0, 1], got "
                f"{self.spread:g}. For one of 16 experts more or fewer give 0.0625."
            )

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> Owl | None:
        """Read `LAYER_OPTIONS`.

        Args:
            options: Those that are given.

        Returns:
            The settings; None where layers are uniform.

        Raises:
            PlanError: `layers` is none of the two, a setting is out of range, or settings
                are given that uniform layers have no use for.
        """
        layers = options.get("layers", UNIFORM)
        if layers not in (UNIFORM, OWL):
            raise PlanError(f"layers must be {UNIFORM} or {OWL}, got {layers!r}.")
        if layers == UNIFORM:
            unused = sorted(set(options) & set(LAYER_OPTIONS) - {"layers"})
            if unused:
                raise PlanError(
                    f"{' and '.join(unused)} must come with --layers owl, got uniform layers."
                )
            return None
        given = {**LAYER_OPTIONS, **options}
        return cls(multiple=given["owl_multiple"], spread=given["owl_range"])

    def count_kept(
        self, oracle: LayerOracle, shape: ModelShape, counts: Sequence[int]
    ) -> tuple[int, ...]:
        """Decide how many experts each layer keeps.

        Args:
            oracle: The model and the task's tokens, of which
                `edgemoe.oracle.oracle.DEFAULT_TOKENS` are read.
            shape: The model.
            counts: Experts that each MoE layer would keep without OWL.

        Returns:
            Experts to keep per MoE layer, as many in all.

        Raises:
            PlanError: The checkpoint was decomposed.
            StreamingError: The family cannot be run layer by layer.
        """
        ratios = oracle.once(
            ("outlier ratios", self.multiple),
            lambda: outlier_ratios(oracle.fewer(DEFAULT_TOKENS), self.multiple),
        )
        return share_by_outliers(shape.layers, counts, ratios, self.spread)


def share_by_outliers(
    layers: Sequence[LayerShape],
    counts: Sequence[int],
    ratios: NDArray[np.float64],
    spread: float,
) -> tuple[int, ...]:
    """Distribute kept experts over layers by how many outliers they have.

    Args:
        layers: The layers.
        counts: Experts that each would keep, multiples of its router groups.
        ratios: D_l, float64 [layers].
        spread: lambda, in [0, 1].

    Returns:
        Experts that each layer keeps: as many in all where layers have equally many router
        groups, else up to a group fewer; multiples of the groups, no fewer than the router
        needs, and less than one step away from what the formula says.
    """
    experts = np.array([layer.num_experts for layer in layers], np.float64)
    steps = [layer.n_group for layer in layers]
    shares = np.asarray(counts) / experts
    least = np.array([layer.least_kept for layer in layers]) / experts
    moves = _move(ratios, experts, np.clip(least - shares, -spread, 0), 1 - shares, spread)
    quotas = [
        (count + size * move) / step
        for count, size, move, step in zip(counts, experts, moves, steps, strict=True)
    ]
    kept = [math.floor(quota + _NOISE) for quota in quotas]
    left = sum(counts) - sum(n * step for n, step in zip(kept, steps, strict=True))
    # Layers whose quotas are cut off at the same end differ in their outliers still.
    order = sorted(
        range(len(layers)),
        key=lambda i: (-round(quotas[i] - kept[i], 9), -ratios[i], i),
    )
    for i in order:
        if steps[i] <= left and (kept[i] + 1) * steps[i] <= layers[i].num_experts:
            kept[i] += 1
            left -= steps[i]
    return tuple(n * step for n, step in zip(kept, steps, strict=True))


def _move(
    ratios: NDArray[np.float64],
    experts: NDArray[np.float64],
    low: NDArray[np.float64],
    high: NDArray[np.float64],
    spread: float,
) -> NDArray[np.float64]:
    """Return by what share of its experts each layer keeps more, 0 on average over experts."""
    width = float(ratios.max() - ratios.min())
    if width == 0:
        return np.zeros(len(ratios))
    high = np.clip(high, 0, spread)
    stretched = (ratios - ratios.min()) / width * 2 * spread
    # The total rises with c in straight lines between these values of c.
    bends = np.unique(np.concatenate([low - stretched, high - stretched]))
    totals = [float(experts @ np.clip(stretched + bend, low, high)) for bend in bends]
    moved = np.clip(stretched + np.interp(0.0, totals, bends), low, high)
    return np.asarray(moved)
