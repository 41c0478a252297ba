"""Are all names of TensorRT's API that edgemoe uses in each release: `make test-tensorrt`.

NVIDIA's bindings (`tensorrt-cu12-bindings`, 1 MB) come apart from its libraries, some GB. They
load with libraries that have the few C functions they link to and nothing behind these, so that
a C compiler makes them here; no call works then, but every name can be looked up. The wheels go
to build/tensorrt/.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path

# From JetPack 6 (10.3), JetPack 7.0 (10.13) and 7.2 (10.16) to the newest.
RELEASES = ("10.3.0", "10.13.3.9", "10.16.1.11", "11.0.0.114", "11.4.0.106")

# By class: what exporters/edgemoe_exporters/compiler and the runtime's TensorRT backend use.
USED = {
    "Builder": (
        "build_serialized_network create_builder_config create_network "
        "create_optimization_profile"
    ),
    "BuilderFlag": "TF32",
    "IBuilderConfig": "add_optimization_profile builder_optimization_level clear_flag",
    "ICudaEngine": "create_execution_context get_tensor_location",
    "IExecutionContext": "execute_async_v3 set_input_shape set_tensor_address",
    "ILogger": "Severity",
    "INetworkDefinition": "get_input num_inputs",
    "IOptimizationProfile": "set_shape set_shape_input",
    "ITensor": "is_shape_tensor name shape",
    "Logger": "ERROR",
    "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
    "OnnxParser": "get_error num_errors parse_from_file",
    "ParserError": "desc node_name node_operator",
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
    "TensorLocation": "HOST",
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
FUNCTIONS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry "
    "getInferLibVersion getNvOnnxParserVersion getPluginRegistry initLibNvInferPlugins"
)

LOOK = """
import importlib, json, sys
api = importlib.import_module("tensorrt_bindings")
used = json.loads(sys.argv[1])
print(api.__version__, *sorted(
    f"{owner}.{name}" for owner, names in used.items() for name in names.split()
    if not hasattr(getattr(api, owner, None), name)
))
"""


def check_sources() -> None:
    """Check that the table is of the sources: all names in it are there, and all classes."""
    root = Path(__file__).resolve().parent.parent
    files = [
        *sorted((root / "exporters/edgemoe_exporters/compiler").glob("*.py")),
        root / "runtime/edgemoe_runtime/backends/tensorrt.py",
    ]
    text = "\n".join(file.read_text() for file in files)
    names = {name for owner in USED.values() for name in owner.split()}
    stale = sorted(name for name in names if not re.search(rf"\b{name}\b", text))
    classes = set(re.findall(r"\b(?:module|trt)\.([A-Z]\w+)", text))
    # ComputeCapability is TensorRT for RTX's own.
    unknown = sorted(classes - set(USED) - {"ComputeCapability"})
    if stale or unknown:
        sys.exit(f"USED must be what the sources use: not there {stale}, not listed {unknown}")


def make_libraries(folder: Path, major: str) -> None:
    """Compile libraries that have the functions by name only."""
    source = folder / "names.c"
    functions = [f"void *{name}(void) {{ return 0; }}\n" for name in FUNCTIONS.split()]
    source.write_text("".join(functions))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        compiler = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(folder / name)]
        subprocess.run([*compiler, str(source)], check=True)


def missing_names(release: str, folder: Path) -> list[str]:
    """Install the bindings of a release, and look every name up."""
    packages = folder / release
    if not packages.exists():
        wheel = f"tensorrt-cu12-bindings=={release}"
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
        subprocess.run([*install, "--target", str(packages), wheel], check=True)
    make_libraries(packages, release.partition(".")[0])
    environment = {"LD_LIBRARY_PATH": str(packages), "PYTHONPATH": str(packages)}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(USED)],
        check=True,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    return done.stdout.split()[1:]


def main() -> int:
    """Look at what was named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("releases", nargs="*", default=RELEASES)
    parser.add_argument("--folder", type=Path, default=Path("build/tensorrt"))
    arguments = parser.parse_args()
    check_sources()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    failed = 0
    for release in arguments.releases:
        missing = missing_names(release, folder)
        failed += bool(missing)
        print(f"TensorRT {release}: missing {', '.join(missing) or 'nothing'}")
    print(f"{len(arguments.releases) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
