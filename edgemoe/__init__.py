"""Fit Mixture-of-Experts language models to one task and one edge device."""

from edgemoe.versions import __version__ as __version__
