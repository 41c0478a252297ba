"""Lay out the experts of several tasks in one stack of weights, each task's contiguous.

A fused MoE op wants the experts of its task stacked in one tensor, and ONNX external data
may point at overlapping ranges of one file. So a layer's experts are stored as one row of
*slots*, ordered such that the experts of every task are one contiguous *window* of it:

    two tasks       A-only | common | B-only         task A reads the first two parts, task B
                                                     the last two; nothing is stored twice
    more tasks      each task's window may overlap those before it; an expert is stored again
                    only where no window can reach the first copy

The order inside a window is free, because a Mixture of Experts does not depend on the order
of its experts (ties between router scores aside, and equal experts give equal outputs). It
must be the order of the task's router rows too, so it is chosen before the graph is made.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from edgemoe.errors import ExportError

ExpertKey = Hashable
"""Identity of an expert: an original id, or how a merged one was made."""

_EXHAUSTIVE_TASKS = 6  # 720 orders of the tasks

_Bags = tuple[tuple[ExpertKey, ...], ...]


@dataclass(frozen=True)
class Window:
    """The contiguous slots of one task: `[start, start + count)`."""

    start: int
    count: int

    @property
    def stop(self) -> int:
        """First slot after the window."""
        return self.start + self.count


@dataclass(frozen=True)
class StackLayout:
    """The order in which one MoE layer's experts are stored, and which task reads which.

    Attributes:
        slots: The expert stored in each slot; one that appears twice is stored twice.
        windows: The slots that each task reads.
    """

    slots: tuple[ExpertKey, ...]
    windows: Mapping[str, Window]

    def experts_of(self, task: str) -> tuple[ExpertKey, ...]:
        """Return the experts of `task` in the order its graph must have them."""
        window = self.windows[task]
        return self.slots[window.start : window.stop]

    @property
    def shared(self) -> bool:
        """Whether two tasks read one slot."""
        windows = sorted(self.windows.values(), key=lambda window: window.start)
        return any(after.start < before.stop for before, after in itertools.pairwise(windows))


def lay_out(selections: Mapping[str, Sequence[ExpertKey]]) -> StackLayout:
    """Order one layer's experts so that each task's are contiguous, storing few twice.

    For a given order of the tasks the windows are placed left to right, each over as much
    as possible of what is already there. With two tasks the result is the union; with up
    to six, all orders of the tasks are tried and the shortest row wins (the tests compare it
    with the optimum for three small tasks); with more, a nearest-neighbour order from each
    task.

    Args:
        selections: Per task, the experts it keeps in this layer, each once.

    Returns:
        The layout. It is the same for the same argument.

    Raises:
        ExportError: A task keeps no expert, or one twice.
    """
    for task, experts in selections.items():
        if not experts or len(set(experts)) != len(experts):
            raise ExportError(
                f"experts of task {task} must be distinct and at least one, got "
                f"{list(experts)}. Make the plan again."
            )
    rank: dict[ExpertKey, int] = {}
    for expert in itertools.chain.from_iterable(selections.values()):
        rank.setdefault(expert, len(rank))
    union = len(rank)
    best: _Bags | None = None
    for order in _task_orders(selections):
        bags: _Bags = ()
        for task in order:
            bags = _place(bags, frozenset(selections[task]), rank)
        if best is None or _length(bags) < _length(best):
            best = bags
        if _length(best) == union:
            break
    slots = tuple(itertools.chain.from_iterable(best or ()))
    windows = {task: _find(slots, frozenset(experts)) for task, experts in selections.items()}
    return StackLayout(slots=slots, windows=windows)


def _task_orders(selections: Mapping[str, Sequence[ExpertKey]]) -> list[tuple[str, ...]]:
    tasks = tuple(selections)
    if len(tasks) <= _EXHAUSTIVE_TASKS:
        return list(itertools.permutations(tasks))
    sets = {task: frozenset(experts) for task, experts in selections.items()}
    orders = []
    for first in tasks:
        order = [first]
        while len(order) < len(tasks):
            last = sets[order[-1]]
            rest = [task for task in tasks if task not in order]
            order.append(max(rest, key=lambda task: len(last & sets[task])))
        orders.append(tuple(order))
    return orders


def _place(bags: _Bags, wanted: frozenset[ExpertKey], rank: Mapping[ExpertKey, int]) -> _Bags:
    """Add a window for `wanted`; a bag is a run of slots whose order is still free."""
    inside = _split_inside(bags, wanted)
    if inside is not None:
        return inside
    head = list(bags)
    tail: list[tuple[ExpertKey, ...]] = []
    missing = set(wanted)
    while head:
        bag = head.pop()
        reused = tuple(expert for expert in bag if expert in missing)
        left = tuple(expert for expert in bag if expert not in missing)
        if reused:
            tail.insert(0, reused)
            missing.difference_update(reused)
        if left:
            head.append(left)
            break
    fresh = tuple(sorted(missing, key=rank.__getitem__))
    return (*head, *tail, fresh) if fresh else (*head, *tail)


def _split_inside(bags: _Bags, wanted: frozenset[ExpertKey]) -> _Bags | None:
    """Split the outer bags so that `wanted` is contiguous, where all of it is there."""
    for start in range(len(bags)):
        covered: set[ExpertKey] = set()
        for stop in range(start + 1, len(bags) + 1):
            bag = set(bags[stop - 1])
            if bag & covered:
                break
            covered |= bag
            middle = set(itertools.chain.from_iterable(bags[start + 1 : stop - 1]))
            if wanted <= covered and middle <= wanted:
                return (*bags[:start], *_split_ends(bags[start:stop], wanted), *bags[stop:])
    return None


def _split_ends(bags: _Bags, wanted: frozenset[ExpertKey]) -> _Bags:
    def split(bag: tuple[ExpertKey, ...], *, wanted_last: bool) -> _Bags:
        used = tuple(expert for expert in bag if expert in wanted)
        rest = tuple(expert for expert in bag if expert not in wanted)
        return tuple(part for part in ((rest, used) if wanted_last else (used, rest)) if part)

    if len(bags) == 1:
        return split(bags[0], wanted_last=True)
    return (
        *split(bags[0], wanted_last=True),
        *bags[1:-1],
        *split(bags[-1], wanted_last=False),
    )


def _length(bags: _Bags) -> int:
    return sum(len(bag) for bag in bags)


def _find(slots: Sequence[ExpertKey], wanted: frozenset[ExpertKey]) -> Window:
    count = len(wanted)
    for start in range(len(slots) - count + 1):
        if set(slots[start : start + count]) == wanted:
            return Window(start=start, count=count)
    raise ExportError(
        f"every task's experts must be contiguous, got {sorted(map(str, wanted))} scattered "
        f"over {list(slots)}. This is a defect of edgemoe: please report it with this message."
    )
