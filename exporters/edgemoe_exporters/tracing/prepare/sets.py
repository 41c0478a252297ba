"""Sets of names in an order of their own, so that the same export gives the same bytes.

transformers computes masks and angles for `set(config.layer_types)`. The order of such a set,
and with it the order of the nodes in a graph, changes with the hashes of its names, which
Python draws anew in every process.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Iterator

    from torch import nn


class SortedSet(set[Any]):
    """A set that is walked through in the order of its members' names."""

    def __iter__(self) -> Iterator[Any]:
        """Return the members by `str`."""
        return iter(sorted(super().__iter__(), key=str))


def order_sets(stack: contextlib.ExitStack, model: nn.Module) -> None:
    """Order the sets that modules hold, and those that their code makes as it runs.

    Args:
        stack: Undoes the replacement.
        model: The transformers model.
    """
    for modeling in {sys.modules[type(module).__module__] for module in model.modules()}:
        # A module's own name comes before the builtin one.
        if modeling.__name__.startswith("transformers.models.") and "set" not in vars(modeling):
            modeling.__dict__["set"] = SortedSet
            stack.callback(modeling.__dict__.pop, "set")
    for module in model.modules():
        for name, value in list(vars(module).items()):
            if type(value) is set and all(type(member) is str for member in value):
                setattr(module, name, SortedSet(value))
                stack.callback(setattr, module, name, value)
