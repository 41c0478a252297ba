"""`from edgemoe import prune` is the function, whatever was imported before or is after."""

from __future__ import annotations

import inspect
import multiprocessing
import pickle
import subprocess
import sys
from unittest import mock

import pytest

import edgemoe
from edgemoe import prune
from edgemoe.plans.plan import LayerPlan

HEAVY = ("torch", "transformers", "numpy", "safetensors", "click", "rich", "tokenizers")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_edgemoe_costs_nothing() -> None:
    code = f"import sys, edgemoe; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert run(code) == "[]\n"


def test_verbs_cost_no_torch_until_they_are_called() -> None:
    names = [name for name in edgemoe.__all__ if name.islower()]
    code = f"import sys; from edgemoe import {', '.join(names)}; print('torch' in sys.modules)"
    assert run(code) == "False\n"


@pytest.mark.parametrize(
    "code",
    [
        "from edgemoe import prune",
        "import edgemoe.prune.keep; from edgemoe import prune",
        "from edgemoe import prune; import edgemoe.prune.keep",
        "from edgemoe.prune.keep import count_kept; from edgemoe import prune",
        "from edgemoe.prune import keep; from edgemoe import prune",
        "import edgemoe.prune; prune = edgemoe.prune",
        "import edgemoe.prune as prune",
        "import importlib; importlib.import_module('edgemoe.prune'); from edgemoe import prune",
        "from edgemoe import prune; import importlib, sys; "
        "importlib.reload(sys.modules['edgemoe.prune']); from edgemoe import prune",
        "from edgemoe.api.prune import prune as first; import edgemoe.prune.widths; "
        "from edgemoe import prune; assert first is prune",
        "from edgemoe import *",
    ],
)
def test_the_name_is_the_function_in_every_order_of_imports(code: str) -> None:
    check = (
        "\nimport types, sys, edgemoe"
        "\nassert isinstance(prune, types.FunctionType) and prune is edgemoe.prune"
        "\nimport edgemoe.prune.keep"
        "\nimport edgemoe.prune.keep as keep"
        "\nfrom edgemoe.prune import keep as same, Plan"
        "\nassert prune is edgemoe.prune and edgemoe.prune.keep is keep is same"
        "\nassert isinstance(sys.modules['edgemoe.prune'], types.ModuleType)"
        "\nassert Plan is edgemoe.Plan"
        "\nprint(prune.__module__, prune.__name__)"
    )
    assert run(code + check) == "edgemoe.api.prune prune\n"


def test_the_package_in_sys_modules_and_the_function_share_one_namespace() -> None:
    from edgemoe.prune import registry

    package = sys.modules["edgemoe.prune"]
    with mock.patch("edgemoe.prune.registry.METHODS", {}):
        assert registry.METHODS == {}
    with mock.patch.object(prune, "LayerPlan", None):
        assert vars(package)["LayerPlan"] is None
    assert vars(package)["LayerPlan"] is LayerPlan


def test_a_verb_is_pickled_by_its_name_and_reaches_other_processes() -> None:
    assert pickle.loads(pickle.dumps(prune)) is prune
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (parameters,) = pool.map(_parameters_of, [prune])
    assert parameters == list(inspect.signature(prune).parameters)


def _parameters_of(verb: object) -> list[str]:
    assert callable(verb)
    return list(inspect.signature(verb).parameters)


def test_dir_lists_the_names_and_others_are_refused() -> None:
    assert set(edgemoe.__all__) <= set(dir(edgemoe))
    for name in edgemoe.__all__:
        assert getattr(edgemoe, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'prunes'"):
        getattr(edgemoe, "prunes")  # noqa: B009  what a typing error would do
    assert run("from edgemoe import api; print(api.__name__)") == "edgemoe.api\n"
