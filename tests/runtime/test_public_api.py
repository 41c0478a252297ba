"""The public names of the package, and the cost of importing them."""

from __future__ import annotations

import importlib
import subprocess
import sys

import edgemoe_runtime
from edgemoe_runtime import errors


def test_every_public_name_exists() -> None:
    assert edgemoe_runtime.__all__ == sorted(edgemoe_runtime.__all__)
    assert sorted(edgemoe_runtime._MODULES) == edgemoe_runtime.__all__
    for name in edgemoe_runtime.__all__:
        value = getattr(edgemoe_runtime, name)
        module = importlib.import_module(f"edgemoe_runtime.{edgemoe_runtime._MODULES[name]}")
        assert getattr(module, name) is value
        assert value.__doc__
    assert set(edgemoe_runtime.__all__) <= set(dir(edgemoe_runtime))


def test_every_error_is_in_the_tree() -> None:
    found = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and value.__module__ == errors.__name__
    }
    for name in found:
        assert issubclass(getattr(errors, name), errors.EdgemoeRuntimeError)
        assert name in (errors.__doc__ or "")
        assert name in edgemoe_runtime.__all__


def modules_after(code: str) -> set[str]:
    script = (
        f"{code}\nimport sys\nprint(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    )
    command = [sys.executable, "-c", script]
    return set(subprocess.check_output(command, text=True).split())


def test_importing_is_light() -> None:
    heavy = {"torch", "transformers", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx",
             "tokenizers", "click", "edgemoe"}  # fmt: skip
    assert not modules_after("import edgemoe_runtime") & (heavy | {"numpy", "json"})
    everything = "import edgemoe_runtime as runtime, edgemoe_runtime.backends.registry"
    everything += "; [getattr(runtime, name) for name in runtime.__all__]"
    assert not modules_after(everything) & heavy
    names = "import edgemoe_runtime.bundle.names"
    assert not modules_after(names) & (heavy | {"numpy", "json"})
