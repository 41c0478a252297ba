"""Versions that results may depend on."""

from __future__ import annotations

from importlib.metadata import version

from edgemoe import __version__


def library_versions() -> dict[str, str]:
    """Return the versions of edgemoe and of the libraries that compute and load for it.

    Returns:
        Versions by distribution name.
    """
    return {
        "edgemoe": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
    }
