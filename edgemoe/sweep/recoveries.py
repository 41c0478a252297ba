"""Recoveries of a sweep, as a command line gives them: `METHOD[:NAME=VALUE,...]`."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from edgemoe.errors import RecoveryError, SweepError
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.registry import find_method

if TYPE_CHECKING:
    from collections.abc import Sequence


def read_recoveries(arguments: Sequence[str]) -> dict[str, RecoverOptions]:
    """Read how cuts are recovered.

    Args:
        arguments: A method of `edgemoe recover` each, and its options with commas between
            them, such as `router-kd:steps=50,batch-tokens=1024`.

    Returns:
        Options by method, in the order of the arguments.

    Raises:
        SweepError: A method comes twice.
        RecoveryError: There is no such method, it has no such option, or a value is out of
            range.
    """
    found: dict[str, RecoverOptions] = {}
    for argument in arguments:
        name, _, texts = argument.partition(":")
        method = find_method(name)
        if name in found:
            raise SweepError(f"a sweep must have each recovery once, got {name} twice.")
        given = dict(_parse(name, text) for text in texts.split(",") if texts)
        found[name] = RecoverOptions(**given)
        method.settle(found[name], has_teacher=True)
    return found


def _parse(method: str, text: str) -> tuple[str, Any]:
    kinds = get_type_hints(RecoverOptions)
    name, equals, value = text.strip().partition("=")
    key = name.replace("-", "_")
    if key not in kinds or not equals:
        known = ", ".join(field.name.replace("_", "-") for field in fields(RecoverOptions))
        raise RecoveryError(
            f"an option of {method} must be NAME=VALUE with a name of {known}, got {text!r}."
        )
    kind = float if float in (kinds[key], *get_args(kinds[key])) else int
    try:
        return key, kind(value)
    except ValueError as error:
        noun = "an integer" if kind is int else "a number"
        raise RecoveryError(
            f"option {name} of {method} must be {noun}, got {value!r}."
        ) from error
