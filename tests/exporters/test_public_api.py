"""`from edgemoe_exporters import export_bundle`: cost, signatures, documentation, errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pytest

import edgemoe_exporters
from edgemoe.cli import main
from edgemoe.errors import ArgumentError, CompileError
from edgemoe_exporters import (
    TARGETS,
    ExportReport,
    ExportRequest,
    compile_bundle,
    export_bundle,
)
from edgemoe_exporters.compiler.compile import CompiledEngine

if TYPE_CHECKING:
    from collections.abc import Callable

HEAVY = (
    "click", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "safetensors", "scipy",
    "tokenizers", "torch", "transformers",
)  # fmt: skip


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_package_and_its_names_cost_nothing() -> None:
    names = ", ".join(edgemoe_exporters.__all__)
    code = f"import sys; from edgemoe_exporters import {names}; "
    code += "ExportRequest(model='moe', output='bundle', target='cpu'); "
    assert run(f"{code} print(sorted(set({HEAVY!r}) & set(sys.modules)))") == "[]\n"


def test_dir_lists_the_names_and_others_are_refused() -> None:
    assert set(edgemoe_exporters.__all__) <= set(dir(edgemoe_exporters))
    for name in edgemoe_exporters.__all__:
        assert getattr(edgemoe_exporters, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'export_bundles'"):
        getattr(edgemoe_exporters, "export_bundles")  # noqa: B009  what a typing error would do


def described(documentation: str, section: str) -> dict[str, str]:
    """What a section of a Google docstring says of each name."""
    found = re.search(rf"^{section}:\n((?:    .*\n|\n)+)", f"{documentation}\n", re.MULTILINE)
    assert found is not None, f"no {section} in: {documentation}"
    entries = re.split(r"^    (?=\w+: )", found.group(1), flags=re.MULTILINE)[1:]
    return {name: text for name, _, text in (entry.partition(": ") for entry in entries)}


@pytest.mark.parametrize("function", [export_bundle, compile_bundle])
def test_functions_document_arguments_result_and_errors(function: Callable[..., Any]) -> None:
    documentation = inspect.getdoc(function) or ""
    assert list(described(documentation, "Args")) == list(
        inspect.signature(function).parameters
    )
    assert "\nReturns:\n" in documentation
    raised = described(documentation, "Raises")
    for name in raised:
        error = getattr(sys.modules["edgemoe.errors"], name, None)
        assert error is not None or name == "BundleError", name
    assert "OutputError" in raised


@pytest.mark.parametrize("kind", [ExportRequest, ExportReport, CompiledEngine])
def test_dataclasses_document_every_field_with_its_unit(kind: Any) -> None:
    texts = described(inspect.getdoc(kind) or "", "Attributes")
    fields = [field.name for field in dataclasses.fields(kind)]
    assert sorted(texts) == sorted(fields)
    for name, text in texts.items():
        if name.endswith("_bytes"):
            assert re.search(r"bytes|[Ss]ize", text), name
        if name.endswith("_tokens"):
            assert "tokens" in text, name


def defaults_of(command: str, *arguments: str) -> dict[str, Any]:
    """Values of a command's parameters where nothing but its arguments is given."""
    with main.commands[command].make_context(command, [*arguments]) as context:
        given = dict(context.params)
    for shown_only in ("as_json", "debug"):
        given.pop(shown_only, None)
    return given


def test_a_request_has_the_options_and_defaults_of_the_command() -> None:
    options = defaults_of("export", "moe", "--output", "bundle", "--target", "cpu")
    # The command takes gigabytes.
    options["memory_limit_bytes"] = options.pop("memory_limit")
    fields = {field.name: field for field in dataclasses.fields(ExportRequest)}
    assert set(options) == set(fields)
    for name, default in options.items():
        if name not in ("model", "output", "target", "tasks", "plans", "recovered"):
            assert fields[name].default == default, name


def test_compiling_has_the_options_and_defaults_of_the_command() -> None:
    options = defaults_of("compile", "bundle", "--target", "tensorrt-rtx")
    options["compute_capabilities"] = options.pop("capabilities") or None
    parameters = inspect.signature(compile_bundle).parameters
    assert set(options) | {"machine", "on_progress"} == set(parameters)
    for name, default in options.items():
        if name not in ("bundle", "target"):
            assert parameters[name].default == default, name


def test_paths_may_be_text(tmp_path: Path) -> None:
    request = ExportRequest(model="moe", output="b", target="cpu", tasks={"a": "a.jsonl"})  # type: ignore[arg-type,dict-item]
    assert (request.model, request.output) == (Path("moe"), Path("b"))
    assert request.tasks == {"a": Path("a.jsonl")}
    with pytest.raises(CompileError, match="target must be one of"):
        compile_bundle(str(tmp_path), "gpu")


@pytest.mark.parametrize(
    "option", ["calibration_tokens", "held_out_tokens", "memory_limit_bytes"]
)
def test_what_the_command_line_refuses_is_refused(tmp_path: Path, option: str) -> None:
    limits: dict[str, Any] = {option: -1}
    request = ExportRequest(model=tmp_path, output=tmp_path / "b", target="cpu", **limits)
    with pytest.raises(ArgumentError, match=rf"{option} must be in \[\d, inf\), got -1"):
        export_bundle(request)


def test_a_missing_extra_is_named() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from edgemoe.errors import MissingDependencyError\n"
        "from edgemoe_exporters import ExportRequest, export_bundle\n"
        "try: export_bundle(ExportRequest(model='moe', output='b', target='cpu'))\n"
        "except MissingDependencyError as error: print(error)"
    )
    assert "pip install 'edgemoe[ort]'" in run(code)


def test_targets_are_those_of_the_command() -> None:
    (option,) = [p for p in main.commands["export"].params if p.name == "target"]
    assert isinstance(option.type, click.Choice)
    assert list(option.type.choices) == list(TARGETS)
