"""Targets of an export and their precisions: one literal table.

The GPUs and packages that engines are compiled for are in `compiler.targets`.
"""

from __future__ import annotations

from dataclasses import dataclass

from edgemoe.errors import ExportError
from edgemoe_runtime.bundle.names import PRECISIONS, Flavour

# Block-wise int8 and int4 weights need opset 21, which JetPack 6.2's TensorRT does not parse.
_TENSORRT_PRECISIONS = ("fp32", "fp16")


@dataclass(frozen=True, kw_only=True)
class Target:
    """One kind of machine that a bundle is made for.

    Attributes:
        name: Its name, as given to `--target`.
        flavour: Whose operators the graphs use.
        precision: The default precision.
        precisions: The precisions that it can run.
    """

    name: str
    flavour: Flavour
    precision: str
    precisions: tuple[str, ...]


TARGETS: dict[str, Target] = {
    "cpu": Target(name="cpu", flavour="ort", precision="int4", precisions=PRECISIONS),
    "cuda": Target(
        name="cuda",
        flavour="ort",
        precision="fp16",
        precisions=PRECISIONS,
    ),
    "tensorrt": Target(
        name="tensorrt",
        flavour="tensorrt",
        precision="fp16",
        precisions=_TENSORRT_PRECISIONS,
    ),
    "tensorrt-rtx": Target(
        name="tensorrt-rtx",
        flavour="tensorrt",
        precision="fp16",
        precisions=_TENSORRT_PRECISIONS,
    ),
    # JetPack 6.2 has TensorRT 10.3: no Attention op (10.14), no KV cache layer (10.15).
    "jetson-orin": Target(
        name="jetson-orin",
        flavour="tensorrt",
        precision="fp16",
        precisions=_TENSORRT_PRECISIONS,
    ),
    "jetson-thor": Target(
        name="jetson-thor",
        flavour="tensorrt",
        precision="fp16",
        precisions=_TENSORRT_PRECISIONS,
    ),
}


def find_target(name: str) -> Target:
    """Find a target by name.

    Args:
        name: Its name, as given to `--target`.

    Returns:
        The target.

    Raises:
        ExportError: There is no such target.
    """
    if name not in TARGETS:
        raise ExportError(f"target must be one of {', '.join(TARGETS)}, got {name!r}.")
    return TARGETS[name]


def choose_precision(target: Target, precision: str | None) -> str:
    """Return the precision to export in.

    Args:
        target: The target.
        precision: The requested one, or None for the target's default.

    Returns:
        One of `PRECISIONS`.

    Raises:
        ExportError: There is no such precision, or the target cannot run it.
    """
    if precision is None:
        return target.precision
    if precision not in PRECISIONS:
        raise ExportError(
            f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}."
        )
    if precision not in target.precisions:
        raise ExportError(
            f"precision of target {target.name} must be one of {', '.join(target.precisions)}, "
            f"got {precision!r}. Use --precision {target.precision}."
        )
    return precision
