from __future__ import annotations

from typing import Any

import pytest

from edgemoe.errors import RecoveryError
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.registry import METHODS, find_method


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, r"steps must be in \[1, inf\), got 0"),
        ({"learning_rate": 0.0}, r"learning_rate must be in \(0, 1\], got 0.0"),
        ({"learning_rate": float("nan")}, "got nan"),
        ({"batch_tokens": 1}, r"batch_tokens must be in \[2, inf\)"),
        ({"sequence_length": 4096}, r"sequence_length must be in \[2, 2048\]"),
        ({"max_tokens": 1}, "max_tokens"),
        ({"held_out_fraction": 0.6}, r"held_out_fraction must be in \(0, 0.5\], got 0.6"),
        ({"seed": -1}, "seed must be in"),
        ({"kd_weight": 1.5}, "kd_weight must be in"),
        ({"temperature": float("inf")}, "temperature must be in"),
        ({"rank": 0}, "rank must be in"),
        ({"alpha": -1.0}, "alpha must be in"),
        ({"router_steps": 200}, r"router_steps must be in \[1, steps=200\), got 200"),
    ],
)
def test_what_is_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(RecoveryError, match=message):
        RecoverOptions(**wrong)


@pytest.mark.parametrize(
    ("method", "given", "teacher", "message"),
    [
        ("router-kd", {}, False, "router-kd must have a teacher, got none"),
        ("lora+router-kd", {}, False, r"lora\+router-kd must have a teacher"),
        ("router-kd", {"rank": 4}, True, "rank must not be given for router-kd"),
        ("router-kd", {"kd_weight": 0.5}, True, "kd_weight must not be given for router-kd"),
        ("uncurl", {"alpha": 4.0}, False, "alpha must not be given for uncurl"),
        ("lora", {"router_steps": 4}, False, "router_steps must not be given for lora"),
        ("lora", {"kd_weight": 0.5}, False, "kd_weight must not be given without a teacher"),
        ("uncurl", {"temperature": 2.0}, False, "temperature must not be given without"),
        ("lora+router-kd", {"kd_weight": 0.0}, True, r"kd_weight must be in \(0, 1\]"),
        ("uncurl", {"steps": 1}, False, r"steps must be in \[2, inf\) for uncurl"),
    ],
)
def test_what_a_method_cannot_use_is_refused(
    method: str, given: dict[str, Any], teacher: bool, message: str
) -> None:
    with pytest.raises(RecoveryError, match=message):
        METHODS[method].settle(RecoverOptions(**given), has_teacher=teacher)


def test_each_method_has_its_own_defaults() -> None:
    def settle(method: str, *, teacher: bool, **given: Any) -> RecoverOptions:
        return METHODS[method].settle(RecoverOptions(**given), has_teacher=teacher)

    router_kd = settle("router-kd", teacher=True)
    assert (router_kd.learning_rate, router_kd.kd_weight) == (5e-5, 1)
    assert router_kd.temperature == 1
    assert "rank" not in router_kd.to_dict()
    lora = settle("lora", teacher=False, rank=3)
    assert (lora.kd_weight, lora.rank, lora.alpha) == (None, 3, 6)
    assert settle("lora", teacher=True).kd_weight == 0.5
    assert settle("lora+router-kd", teacher=True, kd_weight=0.25).kd_weight == 0.25
    assert settle("uncurl", teacher=False, steps=10).router_steps == 3
    assert settle("uncurl", teacher=False, steps=2).router_steps == 1


def test_an_unknown_method_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        RecoveryError, match=r"one of least-squares, lora, lora\+router-kd, .*, got 'dpo'"
    ):
        find_method("dpo")
    assert all(name == method.name for name, method in METHODS.items())
