"""The commands, functions and classes that others call, and what is said of them."""

from __future__ import annotations

import doctest
import inspect
import re
import shlex
from dataclasses import MISSING, fields, is_dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

import click
import pytest

import edgemoe
import edgemoe_runtime
from edgemoe import errors
from edgemoe.cli import main
from edgemoe.cli.options import Command
from edgemoe_exporters import targets
from edgemoe_exporters.request import ExportRequest
from edgemoe_runtime.bundle.names import PRECISIONS, TARGETS

if TYPE_CHECKING:
    from collections.abc import Callable

# The arguments and options of each command, as others call them.
COMMANDS = {
    "carve": "dense --output --experts --shared-fraction --top-k --data",
    "calibrate": "model --task --output --max-tokens --shard --workers --ray --device",
    "merge-stats": "first others --output",
    "prune": "model --stats --task --method --keep --keep-experts --seed --output",
    "decompose": "model --stats --task --method --param-ratio --plan --output",
    "allocate": "model --task --policy --plan --mean-k --output",
    "apply": "model --plan --output",
    "recover": "model --teacher --task --method --output",
    "evaluate": "model --task --k-cap",
    "sweep": "model --task --method --keep --seeds --max-drop --output --workers --ray",
    "export": "model --output --target --precision --task --plan --keep --max-drop",
    "compile": "bundle --target --task",
    "run": "bundle --task --prompt --max-new-tokens --k-cap --stream",
    "bench": "bundle --task --prompt-tokens --new-tokens --repeat",
    "inspect": "path",
    "verify": "bundle",
    "families": "names --check --markdown",
    "doctor": "",
}
# The functions behind them, by the modules of edgemoe.api.
VERBS = {
    "carve": "carve",
    "calibrate": "calibrate",
    "merge-stats": "merge_statistics",
    "prune": "prune",
    "decompose": "decompose",
    "allocate": "allocate",
    "apply": "apply_plan",
    "recover": "recover",
    "evaluate": "evaluate",
    "sweep": "sweep",
}
FUNCTIONS = (*VERBS.values(), "load_model")
# Those that carry out published methods.
WITH_SOURCES = {"allocate", "carve", "decompose", "evaluate", "prune", "recover", "sweep"}


def find(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(import_module(f"edgemoe.api.{name}"), name)
    return function


def names(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in parameter.opts}


def sections(docstring: str) -> dict[str, str]:
    """Split a Google docstring at its headings."""
    parts = re.split(r"^(Args|Attributes|Returns|Raises|Example):\n", docstring, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def entries(section: str) -> list[str]:
    """Return what each entry of a section is about."""
    return re.findall(r"^    ([\w.]+): \S", section, flags=re.M)


def test_the_commands_are_these_in_the_order_of_the_pipeline() -> None:
    assert main.list_commands(click.Context(main)) == list(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_takes_what_is_promised_and_says_what_it_is(name: str) -> None:
    command = main.commands[name]

    assert names(command) >= {*COMMANDS[name].split(), "--json", "--debug"}
    assert ("--force" in names(command)) == ("--output" in names(command) or name == "compile")
    assert ("-o" in names(command)) == ("--output" in names(command))
    assert command.help
    options = [option for option in command.params if isinstance(option, click.Option)]
    assert [option.name for option in options if not option.help] == []
    assert not re.search(r"\bneurons?\b|\broad\b|\bcrew\b", help_of(command))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_examples_that_can_be_typed(name: str) -> None:
    command = main.commands[name]

    _, examples = help_of(command).split("\nExamples:\n")
    assert max(map(len, examples.splitlines())) <= 80
    typed = [shlex.split(line) for line in examples.replace("\\\n", " ").splitlines()]
    assert isinstance(command, Command)
    assert typed == [shlex.split(example) for example in command.examples]
    for program, called, *arguments in typed:
        assert (program, called) == ("edgemoe", name)
        command.make_context(name, arguments)


def help_of(command: click.Command) -> str:
    return command.get_help(click.Context(command, info_name="edgemoe", terminal_width=80))


@pytest.mark.parametrize("name", VERBS)
def test_a_command_has_the_parameters_and_defaults_of_its_function(name: str) -> None:
    command, parameters = main.commands[name], inspect.signature(find(VERBS[name])).parameters
    if name == "merge-stats":  # its files are its arguments
        assert [*parameters] == ["statistics", "output", "force"]
        return
    options = {option.name: option for option in command.params}
    assert set(options) == {*parameters} - {"on_progress"} | {"as_json", "debug"}

    # What the function gets where only what is required is given.
    given: list[str] = []
    for option in command.params:
        if option.required:
            given += ["x"] if isinstance(option, click.Argument) else [option.opts[-1], "1"]
    found = command.make_context(name, given).params
    for parameter in parameters.values():
        if parameter.name == "on_progress":
            continue
        option = options[parameter.name]
        if not option.required:
            assert found[parameter.name] == parameter.default, parameter.name
        # Commands write what functions can also return.
        elif parameter.default is not parameter.empty:
            assert (parameter.name, parameter.default) == ("output", None)


def test_export_has_the_defaults_of_its_request() -> None:
    command = main.commands["export"]
    found = command.make_context("export", ["m", "-o", "b", "--target", "cpu"]).params
    for field in fields(ExportRequest):
        if field.name in found and field.name not in {"model", "output", "target"}:
            made = field.default_factory
            default = field.default if made is MISSING else tuple(made())
            assert found[field.name] == default, field.name


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_documented_as_it_is_called(name: str) -> None:
    function = find(name)
    docstring = inspect.getdoc(function) or ""
    found, parameters = sections(docstring), inspect.signature(function).parameters

    assert list(found) == ["Args", "Returns", "Raises", "Example"]
    assert entries(found["Args"]) == [*parameters]
    raised = entries(found["Raises"])
    assert len(set(raised)) == len(raised)
    for error in raised:
        module, _, last = error.rpartition(".")
        kind = getattr(import_module(module) if module else errors, last)
        assert issubclass(kind, Exception)
    assert re.search(r"Sources?: .*https://", docstring, flags=re.S) or (
        name not in WITH_SOURCES
    )
    # Numbers have a range or a unit.
    for parameter in parameters.values():
        if re.match(r"(int|float)\b", str(parameter.annotation)) and parameter.name != "seed":
            said = re.split(rf"^    {parameter.name}: ", found["Args"], flags=re.M)[1]
            assert re.search(r"[\[(][\w.]+, ", re.split(r"\n    \w", said)[0]), parameter.name
    assert all(parameter.annotation is not parameter.empty for parameter in parameters.values())
    assert "``" not in docstring


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_example_of_a_function_calls_it(name: str) -> None:
    example = sections(inspect.getdoc(find(name)) or "")["Example"]
    code = "".join(part.source for part in doctest.DocTestParser().get_examples(example))

    compile(code, name, "exec")
    assert re.search(rf"^from edgemoe[\w.]* import .*\b{name}$", code, flags=re.M)
    assert f"{name}(" in code


def test_the_front_door_has_the_functions_and_what_they_hand_on() -> None:
    door = set(edgemoe.__all__)
    assert {"Plan", "Statistics", "TaskFile"} == door - set(FUNCTIONS)
    assert set(FUNCTIONS) - door == {"carve", "merge_statistics"}
    for name in door & set(FUNCTIONS):
        assert getattr(edgemoe, name) is find(name)


@pytest.mark.parametrize("name", ["Plan", "Statistics", "TaskFile"])
def test_a_class_documents_its_fields_and_methods(name: str) -> None:
    kind = getattr(edgemoe, name)
    assert is_dataclass(kind)
    documented = entries(sections(inspect.getdoc(kind) or "")["Attributes"])
    assert documented == [field.name for field in fields(kind)]
    for method, found in vars(kind).items():
        function = getattr(found, "__func__", found)
        if method.startswith("_") or not inspect.isfunction(function):
            continue
        told = sections(inspect.getdoc(function) or "")
        bound = 0 if isinstance(found, staticmethod) else 1
        parameters = [*inspect.signature(function).parameters][bound:]
        assert entries(told.get("Args", "")) == parameters, method


def test_targets_and_precisions_are_those_of_the_exporters() -> None:
    assert tuple(targets.TARGETS) == TARGETS
    assert {name for t in targets.TARGETS.values() for name in t.precisions} == {*PRECISIONS}


def test_the_runtime_exports_what_applications_import() -> None:
    assert "Session" in edgemoe_runtime.__all__
    for name in edgemoe_runtime.__all__:
        assert getattr(edgemoe_runtime, name) is not None
        assert not name.startswith("_")
