"""`make test-fast` leaves out what is marked slow, and still enters every folder."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FOLDERS = sorted({path.parent for path in TESTS.rglob("test_*.py")})


def fast_tests(path: Path) -> list[str]:
    """Return the tests of a file without the mark; one with some slow parameters counts."""
    module = ast.parse(path.read_text("utf-8"))
    assigned = [node for node in module.body if isinstance(node, ast.Assign)]
    marks = [node.value for node in assigned if ast.unparse(node.targets[0]) == "pytestmark"]
    if any("pytest.mark.slow" in ast.unparse(mark) for mark in marks):
        return []
    return [
        node.name
        for node in module.body
        if isinstance(node, ast.FunctionDef)
        and node.name.startswith("test_")
        and "pytest.mark.slow" not in map(ast.unparse, node.decorator_list)
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: str(path.relative_to(TESTS)))
def test_every_folder_has_tests_that_are_not_slow(folder: Path) -> None:
    assert any(fast_tests(path) for path in folder.glob("test_*.py"))
