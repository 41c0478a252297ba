"""Which device a process computes on."""

from __future__ import annotations

import re

from edgemoe.errors import EdgemoeError
from edgemoe_runtime.messages import quote

_GPU = re.compile(r"cuda:(\d+)", re.ASCII)


def check_device(wanted: str) -> None:
    """Refuse what names no device, whatever this machine has.

    Args:
        wanted: As in `choose_device`.

    Raises:
        EdgemoeError: It is none of these.
    """
    if wanted not in ("cpu", "cuda", "auto") and _GPU.fullmatch(wanted) is None:
        raise EdgemoeError(f"a device must be cpu, cuda, cuda:N or auto, got {quote(wanted)}.")


def choose_device(wanted: str, available: int, worker: int = 0) -> str:
    """Choose a device for one of several processes, so that they share the GPUs out.

    Args:
        wanted: `cpu`; `cuda`, a GPU; `cuda:N`, that GPU; `auto`, a GPU where there is
            one.
        available: GPUs that this process sees.
        worker: Number of the process, in [0, inf).

    Returns:
        `cpu` or `cuda:N`.

    Raises:
        EdgemoeError: `wanted` is none of these, or a GPU that is not there.
    """
    check_device(wanted)
    if wanted == "cpu" or (wanted == "auto" and available == 0):
        return "cpu"
    named = _GPU.fullmatch(wanted)
    index = int(named[1]) if named else 0
    if index >= available:
        raise EdgemoeError(
            f"the device {wanted} must be one that torch sees, got {available} GPUs. Use "
            "--device cpu, or install a torch with CUDA."
        )
    return f"cuda:{index if named else worker % available}"


def device_here(wanted: str, worker: int = 0) -> str:
    """Choose a device among those that torch sees.

    Args:
        wanted: As in `choose_device`.
        worker: As there.

    Returns:
        `cpu` or `cuda:N`.

    Raises:
        EdgemoeError: As there.
    """
    import torch

    # Asking for GPUs starts CUDA: not where nobody wants one.
    available = 0 if wanted == "cpu" else torch.cuda.device_count()
    return choose_device(wanted, available, worker)
