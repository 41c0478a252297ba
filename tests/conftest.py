from __future__ import annotations

import onnxruntime
import pytest

from edgemoe_runtime.backends.onnxruntime import MINIMUM_VERSION

# Fixtures of the command line's tests that export for the CPU.
_EXPORTED = {"bundle", "copied_bundle"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs fused experts where Python 3.10 gets no onnxruntime that has them."""
    version = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2])
    if version >= MINIMUM_VERSION:
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
