from __future__ import annotations

import os
from importlib.metadata import version

import onnxruntime
import pytest
from hypothesis import settings

from edgemoe_runtime.execution_providers import MINIMUM_VERSION

# Fixtures of the command line's tests that export for the CPU.
_EXPORTED = {"bundle", "copied_bundle"}
# The first transformers whose layers ask one cache for their states.
_STATES = (5, 23)


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
    """Skip what needs packages of which Python 3.10 gets older versions only."""
    transformers = version("transformers")
    if _numbers(transformers) < _STATES:
        without = pytest.mark.skip(reason=f"transformers {transformers} keeps no states")
        for item in items:
            if item.get_closest_marker("states"):
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


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])
