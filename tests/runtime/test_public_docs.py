"""The docstrings of the public names: their sections say what the signatures say."""

from __future__ import annotations

import ast
import builtins
import dataclasses
import inspect
import re
import textwrap
from typing import TYPE_CHECKING, Any

import pytest

import edgemoe_runtime
from edgemoe_runtime import errors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SECTION = re.compile(r"^(Args|Attributes|Returns|Raises|Yields):\n((?:(?: .*)?\n?)*)", re.M)
ENTRY = re.compile(r"^ {4}(\w+): \S", re.M)


def sections(documented: Any) -> dict[str, str]:
    """Return the sections of a docstring by title."""
    return {match[1]: match[2] for match in SECTION.finditer(inspect.getdoc(documented) or "")}


def entries(documented: Any, title: str) -> list[str]:
    """Return the names that a section explains."""
    return ENTRY.findall(sections(documented).get(title, ""))


def public_callables() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Yield functions and methods that applications call, each once."""
    for name in edgemoe_runtime.__all__:
        value = getattr(edgemoe_runtime, name)
        if not inspect.isclass(value):
            yield name, value
            continue
        for method, found in inspect.getmembers(value):
            function = getattr(found, "__func__", found)
            if inspect.isfunction(function) and not method.startswith("_"):
                yield f"{name}.{method}", function


def public_classes() -> list[type]:
    names = [getattr(edgemoe_runtime, name) for name in edgemoe_runtime.__all__]
    return [value for value in names if inspect.isclass(value)]


CALLABLES = dict(public_callables())


def raised_by(function: Callable[..., Any]) -> set[str]:
    """Return the errors that a function's own body raises."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    calls = [
        node.exc
        for node in ast.walk(tree)
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)
    ]
    return {call.func.id for call in calls if isinstance(call.func, ast.Name)}


def test_the_walk_finds_what_applications_call() -> None:
    expected = {"Session.open", "Session.generate", "Generation.to_dict", "verify_bundle"}
    assert expected <= set(CALLABLES)
    assert len(CALLABLES) >= 20


@pytest.mark.parametrize("name", CALLABLES)
def test_sections_match_the_signature(name: str) -> None:
    function = CALLABLES[name]
    signature = inspect.signature(function)
    parameters = [each for each in signature.parameters if each not in ("self", "cls")]
    assert entries(function, "Args") == parameters
    returns = signature.return_annotation not in (None, "None", inspect.Signature.empty)
    assert ("Returns" in sections(function)) == returns
    listed = entries(function, "Raises")
    assert set(listed) >= raised_by(function)
    for error in listed:
        known = getattr(errors, error, None) or getattr(builtins, error, None)
        assert isinstance(known, type)
        assert issubclass(known, Exception)


@pytest.mark.parametrize("name", CALLABLES)
def test_arrays_have_a_dtype_and_a_shape(name: str) -> None:
    function = CALLABLES[name]
    if "Array" in str(inspect.signature(function).return_annotation):
        assert re.search(r"\b(float|int)\d+ `\[.+\]`", sections(function)["Returns"])


@pytest.mark.parametrize("value", public_classes(), ids=lambda value: value.__name__)
def test_classes_explain_what_they_hold(value: type) -> None:
    own = inspect.getdoc(value) or ""
    assert own.split("\n")[0].endswith(".")
    for name, found in vars(value).items():
        if isinstance(found, property):
            assert (found.__doc__ or "").strip(), name
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value)]
        assert entries(value, "Attributes") == fields
    documented = {"Session", "Classification"}
    if value.__name__ in documented:
        assert entries(value, "Attributes")


def test_docstrings_are_of_one_dialect() -> None:
    for name, function in CALLABLES.items():
        text = inspect.getdoc(function) or ""
        assert not re.search(r"``|:(func|class|mod|meth|attr|data|exc):`", text), name
        assert not re.match(r"(Tell|Say|Ask|What|Whether)\b", text), name
