"""The methods of a sweep with their options, and with OWL beside where that is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from edgemoe.errors import SweepError
from edgemoe.prune.owl import LAYER_OPTIONS, OWL, UNIFORM
from edgemoe.prune.registry import find_method, read_options
from edgemoe.sweep.request import split_names, split_option

if TYPE_CHECKING:
    from collections.abc import Sequence

# Ends the name of a method whose layers keep as many experts as OWL says.
_OWL_SUFFIX = f"+{OWL}"


def read_methods(
    arguments: Sequence[str], options: Sequence[str], layers: Sequence[str] = (UNIFORM,)
) -> dict[str, dict[str, Any]]:
    """Read methods and their options as a command line gives them.

    Args:
        arguments: Names, with commas between several.
        options: `METHOD:NAME=VALUE` each.
        layers: How many experts layers keep, `uniform` or `owl` or both: then methods that
            share out experts themselves, or keep them all, come once, the others twice.

    Returns:
        Options by method, in the order of the methods; a method whose layers OWL decides is
        called `METHOD+owl`.

    Raises:
        SweepError: A method or a way comes twice, or an option is of none of the methods.
        PlanError: There is no such method or way, it has no such option, or only OWL is asked
            for with a method that shares out experts itself.
    """
    names = split_names(arguments)
    if len(set(layers)) != len(layers):
        raise SweepError(f"--layers must name each way once, got {', '.join(layers)}.")
    for name in names:
        find_method(name)
    texts: dict[str, list[str]] = {name: [] for name in names}
    for option in options:
        method, text = split_option(option, names)
        texts[method].append(text)
    found = {}
    for name, given in texts.items():
        for way in _ways(name, given, layers):
            chosen = read_options(name, _options_of(way, given, layers))
            owl = chosen.get("layers", UNIFORM) == OWL
            found[f"{name}{_OWL_SUFFIX}" if owl else name] = chosen
    return found


def method_of(name: str) -> str:
    """Return the method behind a name of `read_methods`.

    Args:
        name: The name.

    Returns:
        A name that `edgemoe.prune.registry.find_method` knows.
    """
    return name.removesuffix(_OWL_SUFFIX)


def _ways(method: str, options: Sequence[str], layers: Sequence[str]) -> Sequence[str]:
    """Return the variants in which a method is swept."""
    found = find_method(method)
    itself = found.prunes_width or (found.allocates_layers and "ratios=given" not in options)
    return [way for way in layers if way != OWL] if itself and len(layers) > 1 else layers


def _options_of(way: str, options: Sequence[str], layers: Sequence[str]) -> list[str]:
    """Leave OWL's settings to OWL where a method is swept in both ways."""
    if way == UNIFORM and OWL in layers:
        return [text for text in options if _name(text) not in LAYER_OPTIONS]
    return [*([] if way == UNIFORM else [f"layers={way}"]), *options]


def _name(option: str) -> str:
    return option.partition("=")[0].replace("-", "_")
