"""What is asked of a sweep, and what can be refused before anything is read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from edgemoe.errors import SweepError
from edgemoe.evaluate.gate import find_limit_fault
from edgemoe.staging import recover, refuse_existing, refuse_inputs_inside
from edgemoe_runtime.messages import clip, quote

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from edgemoe.recover.options import RecoverOptions
    from edgemoe.tasks import Kind

DEFAULT_KEEPS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """Request of a sweep: models, methods, fractions, tasks and seeds.

    Attributes:
        model: Checkpoint directory.
        output: Report directory to write.
        tasks: Task files by name.
        methods: Options of each method, by its name as `read_methods` gives it.
        recoveries: How each cut is recovered and judged again, by method of recovery.
        held_out: Files to judge a task by, for those that are not judged by lines of their own.
        keeps: Fractions of each layer's experts to keep, each in (0, 1].
        seeds: Seeds of the methods that draw, each in [0, inf).
        max_drop: Largest drop that the threshold allows, as `edgemoe.evaluate.gate` judges it:
            in [0, 1], for perplexity in [0, inf) with `accept_large_drop`.
        accept_weak_evidence: Whether thresholds may rest on fewer than 20 lines, or on a model
            that is not better than chance.
        accept_large_drop: Whether a perplexity may more than double.
        calibration_tokens: Tokens of each task to choose experts by, in [1, inf).
        held_out_tokens: Tokens of each task to judge by, in [2, inf).
        threads: CPU threads of each process; None for as many as this process has.
        memory_limit_bytes: Size in float32 of the models that may be loaded whole, all workers'
            together; half of what is free without.
        force: Whether `output`, and unfinished work of another sweep, may be replaced.
    """

    model: Path
    output: Path
    tasks: Mapping[str, Path]
    methods: Mapping[str, Mapping[str, Any]]
    recoveries: Mapping[str, RecoverOptions] = field(default_factory=dict)
    held_out: Mapping[str, Path] = field(default_factory=dict)
    keeps: Sequence[float] = DEFAULT_KEEPS
    seeds: Sequence[int] = (0,)
    max_drop: float = 0.02
    accept_weak_evidence: bool = False
    accept_large_drop: bool = False
    calibration_tokens: int = 16_384
    held_out_tokens: int = 8_192
    threads: int | None = None
    memory_limit_bytes: int | None = None
    force: bool = False

    def check_values(self) -> None:
        """Refuse what can be refused without a look at any file.

        Raises:
            SweepError: A value is out of range, or something is given twice or not at all.
        """
        for what, given in (
            ("task", list(self.tasks)),
            ("method", list(self.methods)),
            ("keep", [f"{keep:g}" for keep in self.keeps]),
            ("seed", list(self.seeds)),
        ):
            if not given or len(set(given)) != len(given):
                raise SweepError(
                    f"a sweep must have one {what} or more, each once, got {given}."
                )
        for keep in self.keeps:
            if not 0 < keep <= 1:
                raise SweepError(
                    "--keep must be fractions of each layer's experts in (0, 1], got "
                    f"{keep:g}. For 8 of 16 experts give 0.5."
                )
        if min(self.seeds) < 0:
            raise SweepError(f"seeds must be in [0, inf), got {list(self.seeds)}.")
        # Whether it is large for its task is known once the files are read.
        fault = find_limit_fault(self.max_drop, "text", accept_large=True)
        if fault is not None:
            raise SweepError(fault)
        unknown = sorted(set(self.held_out) - set(self.tasks))
        if unknown:
            raise SweepError(
                f"--held-out must name a task of --task, got {', '.join(unknown)} beside "
                f"{', '.join(self.tasks)}."
            )

    def check(self) -> None:
        """Refuse what can be refused before anything is read.

        Raises:
            SweepError: As `check_values` raises.
            OutputError: The output exists, or contains what is read.
        """
        self.check_values()
        recover(self.output)
        refuse_existing(self.output, force=self.force, directory=True, resumes=True)
        inputs = (self.model, *self.tasks.values(), *self.held_out.values())
        refuse_inputs_inside(self.output, *inputs)

    def check_limit(self, *kinds: Kind) -> None:
        """Refuse a largest drop that means nothing, or hardly what was meant.

        Args:
            kinds: What the tasks' lines are.

        Raises:
            SweepError: It does, for one of them.
        """
        for kind in kinds:
            fault = find_limit_fault(self.max_drop, kind, accept_large=self.accept_large_drop)
            if fault is not None:
                raise SweepError(fault)


def split_names(arguments: Sequence[str]) -> list[str]:
    """Split names of methods, as a command line gives them.

    Args:
        arguments: Names, with commas between several.

    Returns:
        The names in order.

    Raises:
        SweepError: One comes twice.
    """
    names = [name.strip() for argument in arguments for name in argument.split(",")]
    if len(set(names)) != len(names):
        raise SweepError(f"a sweep must have each method once, got {clip(', '.join(names))}.")
    return names


def split_option(option: str, names: Sequence[str]) -> tuple[str, str]:
    """Split an option of one of several methods.

    Args:
        option: `METHOD:NAME=VALUE`.
        names: The methods of the sweep.

    Returns:
        The method, and `NAME=VALUE`.

    Raises:
        SweepError: It is not that, or names no method of the sweep.
    """
    method, colon, text = option.partition(":")
    if not colon or method not in names:
        raise SweepError(
            "--set must be METHOD:NAME=VALUE with a method of this sweep "
            f"({', '.join(names)}), got {quote(option)}."
        )
    return method, text
