"""A worker opens costly things once, and holds one of each kind."""

from __future__ import annotations

import gc
import weakref

from edgemoe.parallel.opening import open_workers
from edgemoe.parallel.worker_cache import clear_cache, get_or_create
from edgemoe.parallel.workers import InProcess, Processes
from tests.edgemoe.parallel import jobs


class Large:
    """What a job needs."""


def test_the_old_one_goes_before_the_new_one_is_made() -> None:
    first = weakref.ref(get_or_create("model", "a", Large))
    assert get_or_create("model", "a", Large) is first()
    assert get_or_create("tokens", "a", Large) is not first()
    alive: list[object] = []

    def make() -> Large:
        gc.collect()
        alive.append(first())
        return Large()

    second = weakref.ref(get_or_create("model", "b", make))
    assert alive == [None]
    clear_cache()
    gc.collect()
    assert second() is None


def test_jobs_of_one_worker_share_and_workers_that_end_let_go() -> None:
    with open_workers(Processes(1)) as workers:
        assert workers.map(jobs.open_once, ["a", "a", "b", "b", "a"], "") == [1, 1, 2, 2, 3]
    for _ in range(2):
        with open_workers(InProcess()) as workers:
            assert workers.map(jobs.open_once, ["a", "a"], "") == [jobs.opened[0]] * 2
    assert jobs.opened == [2]


def test_open_workers_are_lent_and_stay_open() -> None:
    with open_workers(Processes(1)) as workers:
        (first,) = workers.map(jobs.identify, [0], "")
        with open_workers(workers) as lent:
            assert lent is workers
            assert lent.map(jobs.identify, [0], "") == [first]
        assert workers.map(jobs.identify, [0], "") == [first]
        assert workers.executor == Processes(1)
