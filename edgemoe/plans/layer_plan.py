"""What a plan says of one layer: its experts, what each is made of, and its ranks."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from edgemoe.errors import PlanError
from edgemoe.plans.channels import count_mask, fits_mask, is_mask

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.shapes import LayerShape, ModelShape
    from edgemoe.plans.plan_json import PlanReader

# Ranks of an expert's first and second product.
RankPair: TypeAlias = "tuple[int, int]"

# Rows of 16 bytes in the narrowest type that products are computed in.
BASIS_MULTIPLE = 8
# The same for an expert's channels.
WIDTH_MULTIPLE = 8
_EDIT = "Correct the plan, or make it again with `edgemoe prune`."


@dataclass(frozen=True, kw_only=True)
class MergedExpert:
    """One expert of the compressed model.

    Attributes:
        members: Ids of the experts that it is made of, ascending; one id keeps that expert
            as it is.
        weights: Their shares, one each, in [0, inf) with a positive sum; only ratios count.
            None means equal shares.
        reference: The member that the others' channels are aligned to; the one with the
            largest share where it is None.
        neurons: Which intermediate channels a single member keeps, as
            `edgemoe.plans.channels.write_mask` writes them; None keeps all.
    """

    members: tuple[int, ...]
    weights: tuple[float, ...] | None = None
    reference: int | None = None
    neurons: str | None = None

    def __post_init__(self) -> None:
        if not self.members or any(member < 0 for member in self.members):
            raise PlanError(
                "members must be one or more expert ids in [0, inf), got "
                f"{list(self.members)}. {_EDIT}"
            )
        if len(set(self.members)) != len(self.members):
            raise PlanError(
                f"members must be different experts, got {list(self.members)}. {_EDIT}"
            )
        weights = self.weights
        if weights is not None:
            if len(weights) != len(self.members):
                raise PlanError(
                    "weights must have one value for each of the members "
                    f"{list(self.members)}, got {list(weights)}. {_EDIT}"
                )
            if not all(math.isfinite(w) and w >= 0 for w in weights) or sum(weights) <= 0:
                raise PlanError(
                    "weights must be finite, in [0, inf), with a positive sum, got "
                    f"{list(weights)}. {_EDIT}"
                )
            order = sorted(range(len(weights)), key=self.members.__getitem__)
            weights = tuple(float(weights[position]) for position in order)
        if self.reference is not None and self.reference not in self.members:
            raise PlanError(
                f"reference must be one of the members {list(self.members)}, got "
                f"{self.reference}. {_EDIT}"
            )
        if self.neurons is not None:
            self._check_neurons(self.neurons)
        object.__setattr__(self, "members", tuple(sorted(self.members)))
        # A single expert has no share to tell.
        object.__setattr__(self, "weights", weights if len(self.members) > 1 else None)
        object.__setattr__(self, "reference", self.reference if len(self.members) > 1 else None)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each member; they add up to 1."""
        weights = self.weights or (1.0,) * len(self.members)
        total = math.fsum(weights)
        return tuple(weight / total for weight in weights)

    def _check_neurons(self, neurons: str) -> None:
        if len(self.members) > 1:
            raise PlanError(
                "an expert that is merged must keep all its neurons, got neurons for the "
                f"members {list(self.members)}. Merge with one plan, apply it, and choose "
                "neurons of what that writes."
            )
        if not is_mask(neurons):
            raise PlanError(
                "neurons must be lower-case hexadecimal digits, a bit for each neuron, got "
                f"{neurons!r:.80}. {_EDIT}"
            )
        if not count_mask(neurons):
            raise PlanError(
                f"neurons must keep one or more, got none for expert {self.members[0]}. Keep "
                "one, or drop the expert."
            )

    @property
    def aligned_to(self) -> int:
        """Id of the member that the others are aligned to."""
        if self.reference is not None:
            return self.reference
        shares = self.shares
        return self.members[shares.index(max(shares))]


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """The experts of one compressed layer.

    Attributes:
        layer: Index of the decoder layer.
        experts: Its experts, by rising id of their first member; every expert that is a
            member of none is dropped.
        ranks: Of each expert the ranks of its first and its second product, in [1, inf), in
            the order of the experts; None leaves the layer's experts whole.
    """

    layer: int
    experts: tuple[MergedExpert, ...]
    ranks: tuple[RankPair, ...] | None = None

    def __post_init__(self) -> None:
        seen: set[int] = set()
        for expert in self.experts:
            twice = seen.intersection(expert.members)
            if twice:
                raise PlanError(
                    f"layer {self.layer}: an expert must be used once, got expert {min(twice)} "
                    f"twice. {_EDIT}"
                )
            seen.update(expert.members)
        order = sorted(range(len(self.experts)), key=lambda n: self.experts[n].members)
        if self.ranks is not None:
            self._check_ranks(self.ranks)
            if self.prunes_width:
                raise PlanError(
                    f"layer {self.layer}: experts must either keep some of their neurons or be "
                    "factored, got both neurons and ranks. Apply the plan with neurons first, "
                    "then calibrate and decompose what that writes."
                )
            object.__setattr__(self, "ranks", tuple(self.ranks[n] for n in order))
        object.__setattr__(self, "experts", tuple(self.experts[n] for n in order))

    @property
    def is_merging(self) -> bool:
        """Whether any expert is made of several."""
        return any(len(expert.members) > 1 for expert in self.experts)

    @property
    def prunes_width(self) -> bool:
        """Whether any expert keeps only some of its intermediate channels."""
        return any(expert.neurons is not None for expert in self.experts)

    @property
    def stored_ranks(self) -> RankPair | None:
        """The largest ranks: what all experts of the layer are padded to."""
        if self.ranks is None:
            return None
        return max(up for up, _ in self.ranks), max(down for _, down in self.ranks)

    def check(self, shape: LayerShape) -> None:
        """Check the decision against the layer that it is about.

        Args:
            shape: The layer.

        Raises:
            PlanError: It keeps too few experts, or experts that the layer lacks.
        """
        count = len(self.experts)
        if count < shape.top_k:
            raise PlanError(
                f"layer {self.layer} must keep at least top_k={shape.top_k} experts, got "
                f"{count}. Keep {shape.top_k} or more there (--keep-experts {shape.top_k}), or "
                "lower num_experts_per_tok of the checkpoint first."
            )
        if count < shape.min_experts:
            raise PlanError(
                f"layer {self.layer} must keep at least {shape.least_kept} experts, because "
                f"{shape.least_reason}, got {count}. Keep {shape.least_kept} or more there."
            )
        last = max(expert.members[-1] for expert in self.experts)
        if last >= shape.num_experts:
            raise PlanError(
                f"layer {self.layer}: expert ids must be in [0, {shape.num_experts}), got "
                f"{last}. {_EDIT}"
            )
        self._check_groups(shape)

    def check_widths(self, model: ModelShape, *, shares_bases: bool = False) -> None:
        """Check channels and ranks against the experts' widths.

        Args:
            model: The model.
            shares_bases: Whether ranks are those of bases that all experts share.

        Raises:
            PlanError: Channels are not those of an expert of that width, a rank is above what a
                matrix of that size can have, or experts that share bases have several.
        """
        hidden, units = model.hidden_size, model.width_of(self.layer)
        for expert in self.experts:
            if expert.neurons is not None and not fits_mask(expert.neurons, units):
                raise PlanError(
                    f"layer {self.layer}: neurons of expert {expert.members[0]} must be "
                    f"{-(-units // 4)} hexadecimal digits for its {units} neurons, and 0 after "
                    f"them, got {expert.neurons!r:.80}. {_EDIT}"
                )
        if self.ranks is None or self.stored_ranks is None:
            return
        limits = (min(2 * units, hidden), min(units, hidden))
        if shares_bases:
            limits = (hidden, hidden)
            different = sorted({rank for pair in self.ranks for rank in pair})
            if len(different) > 1:
                raise PlanError(
                    f"layer {self.layer}: experts that share bases must have one rank, got "
                    f"{different}. {_EDIT}"
                )
            if different[0] % BASIS_MULTIPLE:
                raise PlanError(
                    f"layer {self.layer}: the rank of shared bases must be a multiple of "
                    f"{BASIS_MULTIPLE}, which torch's grouped products need, got "
                    f"{different[0]}. {_EDIT}"
                )
        for name, rank, limit in zip(("up", "down"), self.stored_ranks, limits, strict=True):
            if rank > limit:
                raise PlanError(
                    f"layer {self.layer}: {name} ranks must be in [1, {limit}], got {rank}. "
                    "Lower them."
                )

    def _check_ranks(self, ranks: tuple[RankPair, ...]) -> None:
        if len(ranks) != len(self.experts):
            raise PlanError(
                f"layer {self.layer}: ranks must have a pair for each of the "
                f"{len(self.experts)} experts, got {len(ranks)}. {_EDIT}"
            )
        if any(rank < 1 for pair in ranks for rank in pair):
            raise PlanError(
                f"layer {self.layer}: ranks must be integers in [1, inf), got "
                f"{min(min(pair) for pair in ranks)}. {_EDIT}"
            )

    def _check_groups(self, shape: LayerShape) -> None:
        """Equal, contiguous groups are how such a router reads its experts."""
        if shape.n_group == 1:
            return
        size = shape.num_experts // shape.n_group
        kept = [0] * shape.n_group
        for expert in self.experts:
            groups = {member // size for member in expert.members}
            if len(groups) > 1:
                raise PlanError(
                    f"layer {self.layer}: merged experts must be of one router group of "
                    f"{size}, got {list(expert.members)}. {_EDIT}"
                )
            kept[groups.pop()] += 1
        if len(set(kept)) > 1:
            raise PlanError(
                f"layer {self.layer}: each of the {shape.n_group} router groups must keep as "
                f"many experts, got {kept}. {_EDIT}"
            )


def stored_width(experts: Sequence[MergedExpert], size: int) -> int:
    """Return the width that a layer's experts are stored in; narrower ones are padded.

    Args:
        experts: The layer's planned experts.
        size: Intermediate channels that its experts have now.

    Returns:
        The largest number of channels that an expert keeps, up to the next multiple of
        `WIDTH_MULTIPLE`, and never above `size`.
    """
    counts = [size if e.neurons is None else count_mask(e.neurons) for e in experts]
    return min(size, -(-max(counts) // WIDTH_MULTIPLE) * WIDTH_MULTIPLE)


def write_layer(layer: LayerPlan) -> str:
    """Write a layer's plan with one expert a line.

    Args:
        layer: The plan.

    Returns:
        JSON; ranks that are equal are written once.
    """
    experts = ",\n".join(f"      {_expert_json(expert)}" for expert in layer.experts)
    ranks = ""
    if layer.ranks is not None:
        pairs = [list(pair) for pair in layer.ranks]
        ranks = f' "ranks": {json.dumps(pairs[0] if len(set(layer.ranks)) == 1 else pairs)},'
    return f'    {{"layer": {layer.layer},{ranks} "experts": [\n{experts}\n    ]}}'


def _expert_json(expert: MergedExpert) -> str:
    content: dict[str, object] = {"members": list(expert.members)}
    if expert.weights is not None:
        content["weights"] = list(expert.weights)
    if expert.reference is not None:
        content["reference"] = expert.reference
    if expert.neurons is not None:
        content["neurons"] = expert.neurons
    return json.dumps(content)


def read_layer(reader: PlanReader) -> LayerPlan:
    """Read what `write_layer` wrote.

    Args:
        reader: The JSON object.

    Returns:
        The plan.

    Raises:
        PlanError: An entry is missing, unknown, or breaks a rule.
    """
    experts = tuple(_read_expert(expert) for expert in reader.objects("experts"))
    layer = reader.build(
        LayerPlan,
        layer=reader.integer("layer"),
        experts=experts,
        ranks=reader.optional_pairs("ranks", len(experts)),
    )
    reader.finish()
    return layer


def _read_expert(reader: PlanReader) -> MergedExpert:
    expert = reader.build(
        MergedExpert,
        members=reader.integers("members"),
        weights=reader.optional_numbers("weights"),
        reference=reader.optional_integer("reference"),
        neurons=reader.optional_string("neurons"),
    )
    reader.finish()
    return expert
