from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import edgemoe

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel made from it; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("dist")
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    """The wheel."""
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_sdist_can_do_what_its_readme_says(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}

    assert names >= {
        "Makefile",
        "constraints.txt",
        ".ci/make-venv",
        "examples/demo/run.py",
        "examples/tasks/NOTICE",
        "examples/reference_moe/NOTICE",
        "examples/reference_moe/smollm2-135m.safetensors",
        "benchmarks/optimum_compat.py",
        "tests/test_packaging.py",
    }


def test_the_wheel_holds_three_packages_and_optimums_file(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}

    assert tops == {
        "edgemoe",
        "edgemoe_exporters",
        "edgemoe_runtime",
        "optimum",
        f"edgemoe-{edgemoe.__version__}.dist-info",
    }
    # One file in optimum's namespace: an __init__.py beside it would hide optimum.
    assert [name for name in wheel.namelist() if name.startswith("optimum/")] == [
        "optimum/commands/register/register_edgemoe.py"
    ]
    assert all(
        not name.endswith((".pyc", ".pt", ".bin")) and "test" not in name
        for name in wheel.namelist()
    )


def test_the_wheel_carries_its_licence(wheel: zipfile.ZipFile) -> None:
    licences = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]

    assert "Apache License" in wheel.read(licences[0]).decode()


def test_a_device_needs_three_packages(wheel: zipfile.ZipFile) -> None:
    (metadata,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    needed = re.findall(
        r"^Requires-Dist: ([\w-]+)[^;\n]*$", wheel.read(metadata).decode(), re.M
    )

    assert set(needed) == {"click", "numpy", "tokenizers"}


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = set(re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.M))
    wanted = {
        re.split(r"[<>=!\[;\s]", line)[0]
        for line in importlib.metadata.requires("edgemoe") or []
        # TensorRT proper comes with the machine; any version that its driver takes will do.
        if not line.startswith(("edgemoe", "tensorrt>="))
    }

    assert wanted <= pinned
