"""The version of edgemoe, and of the libraries that results may depend on."""

from __future__ import annotations

__version__ = "0.1.0"


def library_versions() -> dict[str, str]:
    """Return the versions of edgemoe and of the libraries that compute and load for it.

    Returns:
        Versions by distribution name.
    """
    # Imported here, because `import edgemoe` reads this file and is to cost nothing.
    from importlib.metadata import version

    return {
        "edgemoe": __version__,
        **{name: version(name) for name in ("torch", "transformers")},
    }
