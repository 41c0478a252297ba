"""Options of methods, as a command line gives them."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any

from edgemoe.errors import PlanError
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    Default: TypeAlias = int | float | str  # its type is that of the option


def options_of(decide: Callable[..., Any]) -> dict[str, Any]:
    """List a method's options: the keyword arguments of the function that decides.

    Args:
        decide: The function.

    Returns:
        Options by name, with their defaults.
    """
    parameters = inspect.signature(decide).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def parse_options(
    method: str, known: Mapping[str, Any], texts: Sequence[str]
) -> dict[str, Any]:
    """Read a method's options.

    Args:
        method: The method's name, for messages.
        known: Its options with their defaults, which are integers, floats or strings.
        texts: `NAME=VALUE` each.

    Returns:
        The options by name, in the types of their defaults.

    Raises:
        PlanError: The method has no such option, or the value is of another type.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.replace("-", "_")
        if name not in known or not equals:
            listed = ", ".join(f"{key}={default}" for key, default in known.items()) or "none"
            raise PlanError(
                f"an option of {method} must be NAME=VALUE, got {quote(text)}. Options "
                f"with their defaults: {listed}."
            )
        if name in options:
            raise PlanError(
                f"option {name} of {method} must be given once, got it again as {quote(text)}. "
                "Leave one out."
            )
        if isinstance(known[name], str):
            options[name] = value
        elif isinstance(known[name], float):
            options[name] = _parse_number(method, name, value)
        elif not value.isdecimal():
            raise PlanError(
                f"option {name} of {method} must be an integer in [0, inf), got {quote(value)}."
            )
        else:
            options[name] = int(value)
    return options


def _parse_number(method: str, name: str, value: str) -> float:
    try:
        number = float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise PlanError(f"option {name} of {method} must be a number, got {quote(value)}.")
    return number
