"""The command line that builds the same engine by hand."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from edgemoe_runtime.bundle.names import ENGINES_FOLDER

if TYPE_CHECKING:
    from edgemoe_exporters.compiler.builder import BuilderFlags
    from edgemoe_exporters.compiler.profiles import Profile

_ALWAYS_STRONGLY_TYPED = 11  # the option is gone since this major version
# 10.15 moved trtexec to /usr/bin; JetPack 6 has it in TensorRT's own folder only.
_TRTEXEC = '"$(command -v trtexec || echo /usr/src/tensorrt/bin/trtexec)"'


def build_command(
    package: str,
    version: str | None,
    graph: str,
    engine: str,
    compute_capability: int,
    profile: Profile,
    flags: BuilderFlags,
) -> str:
    """Return the `tensorrt_rtx` or `trtexec` command of an engine, to run in the bundle.

    Args:
        package: `tensorrt` or `tensorrt_rtx`.
        version: Its version, or None where that is not known: a JetPack's, which is 10.
        graph: Name of the ONNX file.
        engine: Name of the engine to write into engines/.
        compute_capability: GPU to build for.
        profile: Shapes of the dynamic inputs.
        flags: Builder settings.

    Returns:
        A shell command of several lines.
    """
    options = [f"--onnx={graph}", f"--saveEngine={ENGINES_FOLDER}/{engine}"]
    if package == "tensorrt_rtx":
        program = "tensorrt_rtx"
        options.append(f"--computeCapabilities={compute_capability}")
    else:
        program = _TRTEXEC
        if version is None or int(version.split(".")[0]) < _ALWAYS_STRONGLY_TYPED:
            options.append("--stronglyTyped")
        options.append(f"--builderOptimizationLevel={flags.optimization_level}")
    if not flags.tf32:
        options.append("--noTF32")
    options.append("--skipInference")
    for index, name in enumerate(("min", "opt", "max")):
        shapes = ",".join(
            f"{tensor}:{'x'.join(map(str, shape[index]))}" for tensor, shape in profile.items()
        )
        options.append(f"--{name}Shapes={shapes}")
    return " \\\n  ".join([program, *map(shlex.quote, options)])


def build_script(engine: str, command: str) -> str:
    """Return a shell script that runs a command of `build_command` from anywhere."""
    return (
        "#!/bin/sh\n"
        f"# Builds {engine} as edgemoe did, with the tool that comes with TensorRT.\n"
        'cd "$(dirname "$0")/.." || exit 1\n'
        f"exec {command}\n"
    )
