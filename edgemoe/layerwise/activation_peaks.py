"""The largest activations of a model while it runs: what float16 would have to hold.

float16 ends at 65504. bfloat16 checkpoints may have activations beyond it, on rare tokens only:
a graph in float16 then answers NaN, with weights that are all within the range.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

LARGEST_FLOAT16 = 65504.0


@dataclass
class ActivationPeaks:
    """The largest activation so far.

    Attributes:
        largest: Absolute value; infinity where one was not finite.
        layer: Decoder layer that it was in; None before anything ran.
        module: Name of the module in the layer that returned it; "" is the layer itself.
    """

    largest: float = 0.0
    layer: int | None = None
    module: str = ""

    def see(self, layer: int, module: str, returned: object) -> None:
        """Look at what a module returned.

        Args:
            layer: Its decoder layer.
            module: Its name there.
            returned: A tensor of any shape, or a tuple that has some.
        """
        if isinstance(returned, (tuple, list)):
            for one in returned:
                self.see(layer, module, one)
            return
        if not isinstance(returned, torch.Tensor) or not returned.is_floating_point():
            return
        if not returned.numel() or returned.device.type == "meta":
            return
        peak = float(returned.detach().abs().max())
        if peak != peak:  # NaN comes of infinities
            peak = float("inf")
        if peak > self.largest:
            self.largest, self.layer, self.module = peak, layer, module


_recording: ContextVar[ActivationPeaks | None] = ContextVar("edgemoe_peaks", default=None)


@contextlib.contextmanager
def recording_peaks() -> Iterator[ActivationPeaks]:
    """Record the largest activation of every pass over layers in a block.

    Yields:
        What is seen so far.
    """
    peaks = ActivationPeaks()
    token = _recording.set(peaks)
    try:
        yield peaks
    finally:
        _recording.reset(token)


@contextlib.contextmanager
def watched(layers: nn.ModuleList, only: int | None = None) -> Iterator[None]:
    """Look at what modules of layers are given and return in a block, where somebody records.

    Args:
        layers: Decoder layers; they need not be loaded yet.
        only: The one that runs, where the others answer in place of a run; None watches all.

    Yields:
        Nothing.
    """
    peaks = _recording.get()
    if peaks is None:
        yield
        return
    with contextlib.ExitStack() as stack:
        for index, layer in enumerate(layers):
            if only not in (None, index):
                continue
            for name, module in layer.named_modules():

                def look(
                    _: Any, given: Any, *returned: Any, index: int = index, name: str = name
                ) -> None:
                    peaks.see(index, name, returned or given)

                stack.callback(module.register_forward_hook(look).remove)
                if name:  # a layer that runs alone is given what the one before returned
                    stack.callback(module.register_forward_pre_hook(look).remove)
        yield


def see_outputs(layer: int, outputs: object) -> None:
    """Look at what a layer handed on, where somebody records.

    Args:
        layer: The decoder layer.
        outputs: Tensors.
    """
    peaks = _recording.get()
    if peaks is not None:
        peaks.see(layer, "", outputs)


def overflow_remark(peaks: ActivationPeaks) -> str | None:
    """Say whether float16 holds what was seen.

    Args:
        peaks: What was seen in float32.

    Returns:
        A sentence to warn with where float16 has less than a factor of two left; else None.
    """
    if peaks.layer is None or peaks.largest < LARGEST_FLOAT16 / 2:
        return None
    where = f"layer {peaks.layer}" + (f", {peaks.module}" if peaks.module else "")
    what = "is beyond" if peaks.largest > LARGEST_FLOAT16 else "is near"
    return (
        f"the largest activation on the data, {peaks.largest:.3g} in {where}, {what} what "
        f"float16 holds ({LARGEST_FLOAT16:.0f}): the bundle may answer NaN. Export with "
        "--precision fp32, or with int8 or int4 for the target cpu, whose activations are "
        "float32."
    )
