"""Fit Mixture-of-Experts language models to one task and one edge device.

The kit: carve, calibrate, prune, apply and evaluate checkpoints. It may need torch; the
device only needs :mod:`edgemoe_runtime`, which never imports this package.
"""

__version__ = "0.1.0"
