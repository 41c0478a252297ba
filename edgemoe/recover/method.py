"""What a recovery method says of itself, and what it prepares for the trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgemoe.errors import RecoveryError
from edgemoe.recover.options import OF_STEPS, TEACHER_OPTIONS, RecoverOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    from edgemoe.models.contract import MoeModel

_DEFAULT_RANK = 16


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
    """Parameters that a method trains, and its phases.

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
class RecoveryMethod:
    """A recovery method.

    Attributes:
        name: Its name on the command line.
        prepare: Makes a model ready to train; it computes the same as before.
        learning_rate: The default; None for a method that takes no gradient.
        kd_weight: Default share of the teacher's divergence in the loss, in [0, 1].
        needs_teacher: Whether it makes no sense without one.
        takes: Options of `edgemoe.recover.options.RecoverOptions` that not every method
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

    def settle(self, options: RecoverOptions, *, has_teacher: bool) -> RecoverOptions:
        """Fill in what this method takes where nothing was said.

        Args:
            options: What was said.
            has_teacher: Whether there is a teacher.

        Returns:
            The options, None only where the method has no use for one.

        Raises:
            RecoveryError: The method needs a teacher and there is none, or an option was given
                that it has no use for.
        """
        if self.needs_teacher and not has_teacher:
            raise RecoveryError(
                f"{self.name} must have a teacher, got none. Give the checkpoint as it was "
                "before it was compressed: --teacher MODEL."
            )
        for name in ("kd_weight", "temperature", "rank", "alpha", "router_steps"):
            if getattr(options, name) is None:
                continue
            if name not in self.takes:
                raise RecoveryError(
                    f"{name} must not be given for {self.name}, which has no use for it, got "
                    f"{getattr(options, name)}. Leave it out."
                )
            if name in TEACHER_OPTIONS and not has_teacher:
                raise RecoveryError(
                    f"{name} must not be given without a teacher, got "
                    f"{getattr(options, name)}. Leave it out, or give --teacher MODEL."
                )
        if self.learning_rate is None:
            self._refuse_training(options)
        settled = replace(
            options,
            learning_rate=options.learning_rate or self.learning_rate,
            max_tokens=options.max_tokens or self.max_tokens,
        )
        if has_teacher:
            share = self.kd_weight if options.kd_weight is None else options.kd_weight
            if self.needs_teacher and share == 0:
                raise RecoveryError(
                    f"kd_weight must be in (0, 1] for {self.name}, got 0. Use another method "
                    "to train on the task alone."
                )
            settled = replace(settled, kd_weight=share, temperature=options.temperature or 1.0)
        if "rank" in self.takes:
            rank = options.rank or _DEFAULT_RANK
            settled = replace(settled, rank=rank, alpha=options.alpha or 2.0 * rank)
        if "router_steps" in self.takes:
            if options.steps < 2:
                raise RecoveryError(
                    f"steps must be in [2, inf) for {self.name}, which has two phases, got "
                    f"{options.steps}."
                )
            settled = replace(
                settled, router_steps=options.router_steps or -(-options.steps // 4)
            )
        return settled

    def _refuse_training(self, options: RecoverOptions) -> None:
        for name in OF_STEPS:
            default = getattr(RecoverOptions, name)
            if getattr(options, name) != default:
                raise RecoveryError(
                    f"{name} must not be given for {self.name}, which takes no steps, got "
                    f"{getattr(options, name)}. Leave it out."
                )
