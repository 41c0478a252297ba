"""How one router turns logits into experts and gates, and which tensors it does it with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from edgemoe.errors import CheckpointError

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"]


@dataclass(frozen=True, kw_only=True)
class RouterRule:
    """How a router turns logits into experts and gates.

    Attributes:
        scoring: Function from logits to scores. `sqrtsoftplus` is `sqrt(log(1 + exp(x)))`;
            `sparsemixer` is that of PhiMoE, see `edgemoe.models.routing.routers.sparsemixer`.
        renormalise: Whether the gates of the experts used are divided by their sum.
        scaling_factor: What every gate is multiplied by, last.
        bias_on: What a correction bias is added to: a bias per expert for the choice only;
            gates never contain it.
        n_group: Number of equal, contiguous groups of experts.
        topk_group: Number of groups a token may use.
        group_score: What ranks a group: the sum of its two best choice scores, or the best.
        group_fill: Choice score of the experts outside the best groups.
        min_group_size: Fewest experts per group with which the family's own router runs, and
            finds top_k experts in the groups that a token may use.
        softmax_over: Whether the softmax runs over all experts or over those chosen.
        sum_epsilon: What is added to the sum that gates are divided by.
        jitter: Width of the band around the best logit that `sparsemixer` looks at.
        idle: Number of choices, after the experts, that stand for no expert: a token that
            makes one leaves the slot unused (ZAYA, https://arxiv.org/abs/2511.17127). Only of
            rules that neither renormalise nor form groups.
        shared: Number of experts that every token uses whose router rows come after those of
            the others: their scores join the sum that gates are divided by, and they get the
            rest (Inkling). Only of sigmoid scores that are renormalised.
    """

    scoring: Scoring
    renormalise: bool
    scaling_factor: float = 1.0
    bias_on: Literal["scores", "logits"] = "scores"
    n_group: int = 1
    topk_group: int = 1
    group_score: Literal["top2", "max"] = "top2"
    group_fill: float = float("-inf")
    min_group_size: int = 1
    softmax_over: Literal["all", "top_k"] = "all"
    sum_epsilon: float = 0.0
    jitter: float = 0.0
    idle: int = 0
    shared: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.topk_group <= self.n_group:
            raise CheckpointError(
                f"topk_group must be in [1, n_group={self.n_group}], got {self.topk_group}. "
                "Correct config.json."
            )

    @property
    def further_rows(self) -> int:
        """Router rows, and logits, after those of the experts."""
        return self.idle + self.shared

    @property
    def softmax_of_chosen(self) -> bool:
        """Whether the softmax runs over the chosen experts only."""
        return self.scoring == "softmax" and self.softmax_over == "top_k"

    @property
    def limits_groups(self) -> bool:
        """Whether some groups of experts are out of a token's reach."""
        return self.topk_group < self.n_group


@dataclass(frozen=True, kw_only=True)
class RouterTensors:
    """Names, from the MoE block on, of what a router computes with.

    Attributes:
        weight: Router rows [experts, inputs], and the rule's further rows. The biases have an
            entry for each of its idle choices, too.
        logit_bias: Part of the logits [experts].
        correction_bias: For the choice only [experts].
        expert_scale: Multiplies gates [experts].
        gate_scale: Multiplies all gates, and those of shared experts [1].
        table: Experts of each token's id [vocabulary, top_k], where the id chooses.
        projection: Submodule that applies `weight`, where the router transforms its input
            before; empty where logits are products of the router's input.
    """

    weight: str
    logit_bias: str | None = None
    correction_bias: str | None = None
    expert_scale: str | None = None
    gate_scale: str | None = None
    table: str | None = None
    projection: str = ""
