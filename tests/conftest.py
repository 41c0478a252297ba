from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, version

import onnxruntime
import pytest
from hypothesis import settings

from edgemoe_runtime.execution_providers import MINIMUM_VERSION

# Fixtures of the command line's tests that export for the CPU.
_EXPORTED = {"bundle", "copied_bundle"}
# The first transformers whose layers ask one cache for their states.
_STATES = (5, 23)
# Families that transformers 5.20, the last for Python 3.10, has not or builds otherwise.
_SINCE_STATES = {
    "aria_text", "bailing_hybrid", "beam", "dots3_note_text", "flint", "granitemoe",
    "granitemoehybrid", "granitemoeshared", "inkling2_text", "jamba", "kimi_linear",
    "nemotron_h", "qwen3_5_moe_text", "qwen3_next", "qwen4_exp_text",
}  # fmt: skip
# Families that the oldest transformers for later Pythons, 5.23, has not.
_SINCE_5_24 = {
    "hy_v4_vl", "hy_v4_vl_text", "inkling2_loop", "inkling2_loop_text", "lara_mini",
}  # fmt: skip


# How examples are drawn: anew each time for who develops, the same each time in CI, so that a
# change is judged by itself. How long one takes says more of the machine than of the code.
settings.register_profile("dev", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None)
settings.register_profile("fast", settings.get_profile("ci"), max_examples=20)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))


def pytest_configure() -> None:
    """Give each process of a parallel run cores of its own: engines spin while they wait."""
    number = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if not number or not hasattr(os, "sched_setaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    own = cores[int(number) :: int(os.environ["PYTEST_XDIST_WORKER_COUNT"])]
    if own:
        os.sched_setaffinity(0, own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs newer packages than are installed, of which Python 3.10 gets none."""
    transformers = _transformers()
    without = pytest.mark.skip(reason=f"transformers {transformers} has no such layers")
    missing: set[str] = set()
    if _numbers(transformers) < (5, 24):
        missing |= _SINCE_5_24
    if _numbers(transformers) < _STATES:
        missing |= _SINCE_STATES
    for item in items:
        needs_states = item.get_closest_marker("states") and _numbers(transformers) < _STATES
        parameters = getattr(getattr(item, "callspec", None), "params", {})
        if needs_states or missing & {v for v in parameters.values() if isinstance(v, str)}:
            item.add_marker(without)
    if _numbers(onnxruntime.__version__) >= MINIMUM_VERSION:
        return
    skip = pytest.mark.skip(
        reason=f"onnxruntime {onnxruntime.__version__} has no fused experts"
    )
    for item in items:
        exports = (
            _EXPORTED & set(getattr(item, "fixturenames", ())) and "cli" in item.path.parts
        )
        if exports or item.get_closest_marker("fused"):
            item.add_marker(skip)


def _transformers() -> str:
    try:
        return version("transformers")
    except PackageNotFoundError:
        # As on a device; the runtime's tests need none.
        return "0.0"


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
