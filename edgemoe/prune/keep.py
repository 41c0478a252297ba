"""How many experts each layer keeps: a fraction, a number, or a number per layer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.errors import PlanError
from edgemoe_runtime.input_files import parse_strict, read_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgemoe.models.shapes import ModelShape


def count_kept(
    shape: ModelShape,
    *,
    keep: float | None = None,
    keep_experts: int | Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Turn what was asked for into a number per MoE layer.

    Args:
        shape: The model.
        keep: Fraction of each layer's experts, in (0, 1]; rounded to the nearest number that
            divides equally among router groups, up where two are as near.
        keep_experts: Experts per layer, one number for all MoE layers or one for each.

    Returns:
        Experts to keep, one number per MoE layer.

    Raises:
        PlanError: Not exactly one of the two is given, there is not one number per layer, or a
            layer would keep more experts than it has or fewer than each token uses.
    """
    if (keep is None) == (keep_experts is None):
        raise PlanError(
            f"either a fraction or a number of experts must be given, got keep={keep} and "
            f"keep_experts={keep_experts}. Pass one of --keep and --keep-experts."
        )
    if keep is not None:
        if not 0 < keep <= 1:
            raise PlanError(
                f"--keep must be a fraction of the experts in (0, 1], got {keep}. For a "
                "number of experts use --keep-experts."
            )
        counts = [
            math.floor(keep * layer.num_experts / layer.n_group + 0.5) * layer.n_group
            for layer in shape.layers
        ]
    elif isinstance(keep_experts, int):
        counts = [keep_experts] * len(shape.layers)
    else:
        counts = list(keep_experts or ())
    return check_counts(shape, counts)


def check_counts(shape: ModelShape, counts: Sequence[int]) -> tuple[int, ...]:
    """Refuse counts that no plan could have.

    Args:
        shape: The model.
        counts: Experts to keep per MoE layer.

    Returns:
        The counts.

    Raises:
        PlanError: There is not one count per layer, a layer would keep more experts than it has
            or fewer than each token uses, or its router groups could not be equal.
    """
    if len(counts) != len(shape.layers):
        raise PlanError(
            f"there must be one count for each of the {len(shape.layers)} MoE layers, got "
            f"{len(counts)}: {list(counts)}. Give one number for all, or one per layer."
        )
    for count, layer in zip(counts, shape.layers, strict=True):
        if count > layer.num_experts:
            raise PlanError(
                f"layer {layer.layer} can keep at most its {layer.num_experts} experts, got "
                f"{count}. Keep fewer."
            )
        if count < layer.min_experts:
            share = math.ceil(1000 * layer.least_kept / layer.num_experts) / 1000
            raise PlanError(
                f"layer {layer.layer} must keep at least {layer.least_kept} of its "
                f"{layer.num_experts} experts, because {layer.least_reason}, got {count}. Keep "
                f"more: --keep {share:g} or --keep-experts {layer.least_kept}."
            )
        if count % layer.n_group:
            below = max(count // layer.n_group * layer.n_group, layer.least_kept)
            above = -(-count // layer.n_group) * layer.n_group
            raise PlanError(
                f"layer {layer.layer} must keep as many experts in each of its "
                f"{layer.n_group} router groups, got {count} in all. Use --keep-experts "
                f"{' or '.join(map(str, sorted({below, above})))}."
            )
    return tuple(counts)


def parse_keep_experts(text: str) -> int | tuple[int, ...]:
    """Read the value of `--keep-experts`.

    Args:
        text: A number, numbers with commas between them, or the path of a JSON file that holds
            a list of numbers.

    Returns:
        One number for all MoE layers, or one for each.

    Raises:
        PlanError: The text is none of these.
    """
    path = Path(text)
    values: object
    if path.is_file():
        try:
            values = parse_strict(read_file(path))
        except (OSError, ValueError) as error:
            raise PlanError(
                f"{path} must hold a JSON list of integers, got: {error}."
            ) from error
    else:
        try:
            values = [int(part) for part in text.split(",")]
        except ValueError as error:
            raise PlanError(
                "--keep-experts must be a number, numbers with commas between them, or the "
                f"file of a JSON list, got {text!r}."
            ) from error
        if len(values) == 1:
            return values[0]
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise PlanError(f"{path} must hold a JSON list of integers, got {values!r:.80}.")
    return tuple(values)
