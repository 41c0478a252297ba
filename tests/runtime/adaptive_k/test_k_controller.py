"""The controller of a session on a simulated clock: which rung, and why."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgemoe_runtime.adaptive_k.adaptation import AdaptationConfig
from edgemoe_runtime.adaptive_k.k_controller import KController
from edgemoe_runtime.adaptive_k.limits import Limits
from edgemoe_runtime.adaptive_k.prompt_cost import PromptCost, prompt_share_ms
from edgemoe_runtime.adaptive_k.rung_cost import decreasing_costs
from edgemoe_runtime.bundle.k_ladder import KRung, RungCost
from edgemoe_runtime.device.sensors import Sensors
from edgemoe_runtime.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Callable

COSTS = (1.0, 0.8, 0.6, 0.4)
LADDER = tuple(
    KRung(
        name=f"k{4 - index}",
        k_cap=(4 - index,) * 2,
        # On prompts the rungs save half as much.
        cost=RungCost(prefill=(1 + cost) / 2, decode=cost),
    )
    for index, cost in enumerate(COSTS)
)
COOL = Sensors(
    memory_total_bytes=None,
    memory_available_bytes=None,
    swap_total_bytes=None,
    zones=(),
    throttling=(),
    over_current_events={},
    power_mw={},
    gpu_clock_fraction=None,
    absent=(),
)


class Machine:
    """A machine whose tokens take as long as the rung in force costs."""

    def __init__(
        self,
        adaptation: AdaptationConfig,
        token_ms: float,
        prompt_ms: float = 1.0,
        host_overhead_ms: float = 0.0,
        work: PromptCost | None = None,
    ) -> None:
        self.seconds = 0.0
        self.host_overhead_ms = host_overhead_ms
        self.token_ms, self.prompt_ms = token_ms, prompt_ms
        self.caps: list[tuple[int, ...]] = []
        self.work = work or PromptCost()
        self.controller = KController(
            LADDER, self.caps.append, adaptation, lambda: self.seconds, work
        )

    def answer(self, prompt: int, new: int) -> tuple[float, list[str]]:
        """Return milliseconds of a request, and the rung of each of its runs."""
        begin, rungs = self.seconds, []
        self.controller.begin()
        self.controller.before_prompt(prompt, new - 1)
        cost = self.controller.rung.cost
        assert cost is not None
        takes = self.work.in_tokens(prompt) * self.prompt_ms * cost.prefill
        self._spend(takes, self.controller.after_prompt, prompt)
        rungs.append(self.controller.rung.name)
        for made in range(1, new):
            self.seconds += self.host_overhead_ms / 1000
            self.controller.before_step(new - made)
            cost = self.controller.rung.cost
            assert cost is not None
            self._spend(self.token_ms * cost.decode, self.controller.after_step)
            rungs.append(self.controller.rung.name)
        return 1000 * (self.seconds - begin), rungs

    def _spend(self, ms: float, record: Callable[..., None], *arguments: int) -> None:
        self.seconds += ms / 1000
        record(*arguments, ms / 1000)


def test_a_request_deadline_moves_down_and_is_kept() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=400), token_ms=10)
    # 64 + 49 * 10 ms at the full k: too long by a third.
    for _ in range(4):
        took, rungs = machine.answer(64, 50)
        assert took <= 400
    assert "k4" not in rungs[10:]
    assert machine.caps
    assert machine.controller.fallbacks == ()
    assert {move.phase for move in machine.controller.moves} <= {"prompt", "decode"}
    assert all("allowed" in m.reason or "room" in m.reason for m in machine.controller.moves)
    assert machine.controller.move_count == len(machine.controller.moves)


def test_the_first_request_knows_nothing_and_the_next_one_does() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=90), token_ms=10, prompt_ms=1)
    # A prompt of 100 tokens takes 100 ms, on the lowest rung 70.
    took, rungs = machine.answer(100, 1)
    assert took == pytest.approx(100)
    assert rungs == ["k4"]
    took, rungs = machine.answer(100, 1)
    assert took < 90
    assert rungs != ["k4"]


def test_a_token_deadline_holds_for_new_tokens_only() -> None:
    machine = Machine(AdaptationConfig(token_ms=9), token_ms=10)
    _, rungs = machine.answer(64, 40)
    assert rungs[0] == "k4"
    assert set(rungs[10:]) == {"k3"}
    assert machine.controller.fallbacks == ()


def test_short_prompts_predict_the_time_of_a_long_one() -> None:
    # 8 ms and a tenth for each token: 8.5 ms for 5 tokens, 28 ms for 200.
    work = PromptCost(offset=80.0)
    machine = Machine(AdaptationConfig(deadline_ms=40), token_ms=1, prompt_ms=0.1, work=work)
    for _ in range(4):
        machine.answer(5, 1)
    _, rungs = machine.answer(200, 1)
    assert rungs == ["k4"]
    assert machine.controller.fallbacks == ()
    assert machine.controller.full_k_fits(20)
    # Without the fixed time, short prompts would predict 340 ms.
    misled = Machine(AdaptationConfig(deadline_ms=40), token_ms=1, prompt_ms=1.7)
    for _ in range(4):
        misled.answer(5, 1)
    misled.answer(200, 1)
    assert misled.controller.fallbacks != ()


def test_work_counts_runs_and_chunks() -> None:
    work = PromptCost(offset=10.0, chunk_tokens=100)
    assert [work.in_tokens(n) for n in (1, 100, 101, 250)] == [11, 110, 121, 280]
    assert work.in_tokens(30, runs=4) == 70


def test_the_host_overhead_of_a_token_counts() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=400), token_ms=10, host_overhead_ms=4)
    # 10 + 29 * 14 ms at the full k: too long, and 29 * 10 alone are not.
    machine.answer(10, 30)
    for _ in range(3):
        took, rungs = machine.answer(10, 30)
        assert took <= 400
        assert set(rungs[5:]) != {"k4"}
    each = Machine(AdaptationConfig(token_ms=12), token_ms=10, host_overhead_ms=3)
    _, rungs = each.answer(10, 60)
    assert each.controller.late_tokens > 0
    assert set(rungs[10:]) == {"k3"}
    each.answer(10, 60)
    assert each.controller.late_tokens == 0


def test_a_slow_reader_of_a_stream_spends_no_time_of_the_request() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=400, token_ms=11), token_ms=10)
    machine.answer(10, 3)
    machine.controller.begin()
    machine.controller.before_prompt(10, 4)
    machine._spend(10, machine.controller.after_prompt, 10)
    for left in (4, 3, 2, 1):
        machine.controller.pause()
        machine.seconds += 3600
        machine.controller.resume()
        machine.controller.before_step(left)
        machine._spend(10, machine.controller.after_step)
    assert machine.controller.late_tokens == 0
    assert machine.controller.fallbacks == ()
    assert machine.controller.rung.name == "k4"


def test_new_tokens_make_up_for_a_prompt_that_saves_little() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=130), token_ms=10)
    # 100 + 100 ms at the full k, 70 + 40 on the lowest rung.
    for number in range(4):
        took, _ = machine.answer(100, 11)
        assert number == 0 or took <= 130
        assert number == 0 or machine.controller.fallbacks == ()


@given(
    st.floats(-10, 500),
    st.floats(0.1, 200),
    st.floats(0, 200),
    st.floats(0.1, 1),
    st.floats(0.1, 1),
)
def test_a_prompt_gets_what_it_needs_where_both_can_be_in_time(
    left: float, prompt: float, decode: float, least_p: float, least_d: float
) -> None:
    share = prompt_share_ms(left, (prompt, decode), (least_p, least_d))
    fastest = prompt * least_p + decode * least_d
    if left >= prompt + decode:
        assert share >= prompt * (1 - 1e-9)
        assert left - share >= decode * (1 - 1e-9) - 1e-9
    elif left >= fastest:
        assert share >= prompt * least_p - 1e-6 * (prompt + decode)
        assert left - share >= decode * least_d - 1e-6 * (prompt + decode)
    elif least_p < 1 or least_d < 1:
        assert share <= prompt * least_p + 1e-6 * (prompt + decode)


def test_answers_of_one_token_move_as_well() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=90), token_ms=10)
    machine.controller.begin()
    for _ in range(3):
        machine.controller.begin()
        machine.controller.before_prompt(100, 20)
        cost = machine.controller.rung.cost
        assert cost is not None
        machine._spend(100 * cost.prefill, machine.controller.after_prompt, 100)
    assert machine.controller.rung.name != "k4"


def test_what_no_rung_can_do_is_said_once_in_each_request() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=100), token_ms=10)
    machine.answer(10, 50)
    (fallback,) = machine.controller.fallbacks
    assert fallback.kind == "deadline"
    assert "no rung is fast enough" in fallback.reason
    assert "4.00 ms" in fallback.reason
    machine.token_ms = 0.1
    machine.answer(10, 50)
    assert machine.answer(10, 50)[0] < 100
    assert machine.controller.fallbacks == ()


def test_a_throttled_machine_takes_rungs_from_prompts_and_tokens() -> None:
    reading = {"now": replace(COOL, throttling=("gpu-throttle-alert",))}
    reads = []

    def read() -> Sensors:
        reads.append(machine.seconds)
        return reading["now"]

    limits = Limits(relief_seconds=2.0)
    machine = Machine(AdaptationConfig(read=read, limits=limits), token_ms=20)
    machine.answer(10, 400)
    assert machine.controller.rung.name == "k1"
    _, rungs = machine.answer(10, 2)
    assert rungs == ["k1", "k1"]
    reading["now"] = COOL
    for _ in range(20):
        _, rungs = machine.answer(10, 100)
    assert rungs == ["k4"] * 100
    assert all(b - a >= 1 for a, b in itertools.pairwise(reads))
    assert any(
        "gpu-throttle-alert is active" in move.reason for move in machine.controller.moves
    )


def test_a_single_rung_never_moves_and_still_reports_its_deadline() -> None:
    caps: list[tuple[int, ...]] = []
    controller = KController(
        LADDER[:1], caps.append, AdaptationConfig(deadline_ms=5), lambda: 0.0
    )
    for _ in range(2):
        controller.begin()
        controller.before_prompt(10, 0)
        controller.after_prompt(10, 0.1)
    assert caps == []
    assert controller.fallbacks[0].kind == "deadline"
    assert "this session stays on its rung" in controller.fallbacks[0].reason


def test_escalation_needs_the_time_for_it() -> None:
    machine = Machine(AdaptationConfig(deadline_ms=30), token_ms=1)
    machine.answer(10, 1)
    machine.answer(10, 1)
    # 20 ms are left, and a tenth of them is kept.
    assert machine.controller.full_k_fits(17)
    assert not machine.controller.full_k_fits(19)


def test_a_second_answer_does_not_break_the_time_of_a_token() -> None:
    fast = Machine(AdaptationConfig(token_ms=12), token_ms=10)
    fast.answer(10, 9)
    assert fast.controller.full_k_fits(10, 9)
    slow = Machine(AdaptationConfig(token_ms=12), token_ms=20)
    slow.answer(10, 9)
    assert slow.controller.rung is not LADDER[0]
    assert not slow.controller.full_k_fits(10, 9)
    # Choices make no new tokens.
    assert slow.controller.full_k_fits(10)


@given(st.lists(st.floats(0.01, 3.0), min_size=1, max_size=9))
def test_costs_of_prompts_fall_whatever_was_measured(costs: list[float]) -> None:
    found = decreasing_costs(costs)
    assert found[0] == 1
    assert all(a > b for a, b in itertools.pairwise(found))
    for cost, made in zip(costs[1:], found[1:], strict=True):
        assert made <= max(1.0, cost)


@pytest.mark.parametrize("name", ["deadline_ms", "token_ms"])
@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), "200"])
def test_times_are_above_zero(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=f"{name} must be above 0"):
        AdaptationConfig(**{name: value})
