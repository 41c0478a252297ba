"""Compile targets: which TensorRT, which GPUs, which machine each needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgemoe.errors import CompileError
from edgemoe_runtime.device.gpu import compute_capability
from edgemoe_runtime.device.jetson import detect_jetson


@dataclass(frozen=True, kw_only=True)
class CompileTarget:
    """One target of `edgemoe compile`.

    Attributes:
        name: As on the command line.
        package: `tensorrt` or `tensorrt_rtx`.
        capabilities: Compute capabilities that can be requested; empty: that of this GPU.
        place: Where it has to be compiled, for people.
        on_jetson: Whether only a Jetson of this target can compile it.
    """

    name: str
    package: str
    capabilities: tuple[int, ...]
    place: str
    on_jetson: bool = False


TARGETS: dict[str, CompileTarget] = {
    "tensorrt-rtx": CompileTarget(
        name="tensorrt-rtx",
        package="tensorrt_rtx",
        capabilities=(75, 80, 86, 89, 120, 121),
        place="any x86-64 machine",
    ),
    "tensorrt": CompileTarget(
        name="tensorrt",
        package="tensorrt",
        capabilities=(),
        place="the machine with the GPU",
    ),
    "jetson-orin": CompileTarget(
        name="jetson-orin",
        package="tensorrt",
        capabilities=(87,),
        on_jetson=True,
        place="the Jetson Orin",
    ),
    "jetson-thor": CompileTarget(
        name="jetson-thor",
        package="tensorrt",
        capabilities=(110,),
        on_jetson=True,
        place="the Jetson Thor",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine that compiles.

    Attributes:
        jetson_target: Target of the Jetson that it is, or None.
        compute_capability: Of the first GPU, major times ten plus minor, or None without one.
    """

    jetson_target: str | None
    compute_capability: int | None

    @classmethod
    def detect(cls) -> Machine:
        """Detect this machine from its device tree and its CUDA driver."""
        jetson = detect_jetson(Path("/"))
        return cls(
            jetson_target=None if jetson is None or jetson.soc is None else jetson.soc.target,
            compute_capability=compute_capability(),
        )


def find_target(name: str) -> CompileTarget:
    """Return the target of that name.

    Raises:
        CompileError: There is no engine to build for it.
    """
    if name in TARGETS:
        return TARGETS[name]
    hint = ""
    if name in {"cpu", "cuda"}:
        hint = f" Target {name} runs in onnxruntime as exported: there is nothing to compile."
    raise CompileError(f"target must be one of {', '.join(TARGETS)}, got {name!r}.{hint}")


def choose_capabilities(
    target: CompileTarget, asked: tuple[int, ...] | None, machine: Machine
) -> tuple[int, ...]:
    """Return the compute capabilities to build for.

    Args:
        target: The compile target.
        asked: Requested capabilities, or None for all of the target.
        machine: This machine.

    Returns:
        Capabilities, ascending and distinct.

    Raises:
        CompileError: A requested one cannot be built for, or there is no GPU.
    """
    known = target.capabilities
    if not known:
        if machine.compute_capability is None:
            raise CompileError(
                "target tensorrt must be compiled on the machine whose GPU will run it, and no "
                "CUDA GPU was found here. Run it there (is the driver installed? try "
                "`nvidia-smi`), or export the model again with --target tensorrt-rtx, whose "
                "engines are built without a GPU."
            )
        known = (machine.compute_capability,)
    wanted = tuple(sorted(set(asked))) if asked is not None else known
    unknown = sorted(set(wanted) - set(known))
    if unknown or not wanted:
        raise CompileError(
            f"compute capabilities of target {target.name} must be among "
            f"{', '.join(map(str, known))}, got {', '.join(map(str, unknown)) or 'none'}. "
            "Leave the choice out to build for all of them."
        )
    return wanted
