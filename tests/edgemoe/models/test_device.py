"""Which process gets which device; that a GPU is used is for a machine that has one."""

from __future__ import annotations

import pytest

from edgemoe.errors import EdgemoeError
from edgemoe.models.device import choose_device, device_here


def test_workers_take_turns_at_gpus() -> None:
    for wanted in ("auto", "cuda"):
        assert [choose_device(wanted, 2, worker) for worker in range(3)] == [
            "cuda:0",
            "cuda:1",
            "cuda:0",
        ]
    assert choose_device("cuda:1", 2, worker=4) == "cuda:1"


def test_the_cpu_is_used_where_it_is_asked_for_or_all_there_is() -> None:
    assert choose_device("cpu", 8, worker=3) == "cpu"
    assert choose_device("auto", 0, worker=3) == "cpu"
    assert device_here("cpu") == "cpu"


@pytest.mark.parametrize(
    ("wanted", "available", "rule"),
    [
        ("cuda", 0, "must be one that torch sees, got 0 GPUs"),
        ("cuda:2", 2, "must be one that torch sees, got 2 GPUs"),
        ("gpu", 2, "must be cpu, cuda, cuda:N or auto, got 'gpu'"),
        ("cuda:-1", 2, "must be cpu, cuda, cuda:N or auto"),
    ],
)
def test_other_devices_are_refused(wanted: str, available: int, rule: str) -> None:
    with pytest.raises(EdgemoeError, match=rule):
        choose_device(wanted, available)
