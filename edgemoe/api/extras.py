"""Check that the extra of a command or function is installed, and name it where it is not."""

from __future__ import annotations

import importlib.util

from edgemoe.errors import MissingDependencyError

# What an extra of pyproject.toml makes importable.
_MODULES: dict[str, tuple[str, ...]] = {
    "export": (
        "torch",
        "transformers",
        "safetensors",
        "scipy",
        "onnx",
        "onnx_ir",
        "onnxscript",
        "peft",
    ),
    "ort": ("onnxruntime",),
    "ray": ("ray",),
    "sweep": ("matplotlib",),
}


def needs(*extras: str) -> None:
    """Check that optional extras are installed.

    Args:
        extras: Names of extras in pyproject.toml.

    Raises:
        MissingDependencyError: A package of an extra is missing; the message says how to
            install it.
    """
    for extra in extras:
        missing = [name for name in _MODULES[extra] if not _is_installed(name)]
        if missing:
            raise MissingDependencyError(
                f"this command needs the extra {extra!r}: {', '.join(missing)} "
                f"{'is' if len(missing) == 1 else 'are'} not installed. "
                f"Run: pip install 'edgemoe[{extra}]'"
            )


def _is_installed(module: str) -> bool:
    try:
        spec = importlib.util.find_spec(module)
    except ValueError:  # sys.modules[module] is None: its import is blocked
        return False
    # Without an origin it is any folder of that name, such as Ray's /tmp/ray.
    return spec is not None and spec.origin is not None
