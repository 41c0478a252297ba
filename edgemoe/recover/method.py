"""What a recovery method says of itself, and what it prepares for the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.options import RecoverOptions


@dataclass(frozen=True, kw_only=True)
class Phase:
    """Steps in which the same parameters train; the learning rate rises and falls in each.

    Attributes:
        steps: How many.
        names: The parameters that train.
    """

    steps: int
    names: frozenset[str]


def _nothing() -> None:
    """Leave the model as it is."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a method trains.

    Attributes:
        parameters: All parameters that train in some phase, by their names in the model; all
            others are frozen.
        phases: What trains when.
        rates: Factors of the learning rate, of parameters where it is not 1.
        begin: Changes the model before the first step, always in the same way.
        finish: Gives the model its former shape, after the last step.
        extra_bytes: Memory that a step takes besides, such as copies of weights.
    """

    parameters: Mapping[str, nn.Parameter]
    phases: tuple[Phase, ...]
    rates: Mapping[str, float] = field(default_factory=dict)
    begin: Callable[[], None] = _nothing
    finish: Callable[[], None] = _nothing
    extra_bytes: int = 0

    @property
    def steps(self) -> int:
        """Steps of all phases."""
        return sum(phase.steps for phase in self.phases)

    def locate(self, step: int) -> tuple[Phase, int]:
        """Find the phase of a step.

        Args:
            step: Counted from 0, in [0, steps).

        Returns:
            The phase, and which of its steps it is.
        """
        for phase in self.phases:
            if step < phase.steps:
                return phase, step
            step -= phase.steps
        raise IndexError(step)


@dataclass(frozen=True, kw_only=True)
class Method:
    """A recovery method.

    Attributes:
        name: Its name on the command line.
        prepare: Makes a model ready to train; it computes the same as before.
        learning_rate: The default; None for a method that takes no gradient.
        kd_weight: Default share of the teacher's divergence in the loss, in [0, 1].
        needs_teacher: Whether it makes no sense without one.
        takes: Options of :class:`edgemoe.recover.options.RecoverOptions` that not every method
            has a use for, and this one has.
        weight_decay: Of AdamW.
        run: Does the work where it is not a training by gradients.
        max_tokens: Tokens of each task to read, where nothing is said; None for all.
    """

    name: str
    prepare: Callable[[MoeModel, RecoverOptions], Training]
    learning_rate: float | None
    kd_weight: float
    needs_teacher: bool = False
    takes: frozenset[str] = frozenset()
    weight_decay: float = 0.0
    run: Callable[..., float | None] | None = None
    max_tokens: int | None = None
