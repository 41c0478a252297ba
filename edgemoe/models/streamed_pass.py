"""Run batches through a whole checkpoint with one decoder layer in memory at a time."""

from __future__ import annotations

import contextlib
import itertools
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.models.outputs import DEFAULT_LIMIT_BYTES, LayerOutputs
from edgemoe.models.replay import only_head, only_layer
from edgemoe.progress import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    import torch

    from edgemoe.models.opening import StreamedModel

Layer: TypeAlias = "Callable[[int], AbstractContextManager[Any]]"


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        ids: Token ids, int64 ``[rows, tokens]``.
        logits_to_keep: Last positions that logits are wanted of; 0 for all.
    """

    ids: torch.Tensor
    logits_to_keep: int = 0

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Arguments of the decoder."""
        return {"input_ids": self.ids, "use_cache": False}


def run_batches(
    streamed: StreamedModel,
    batches: Sequence[Batch],
    take: Callable[[int, torch.Tensor], None],
    directory: Path,
    *,
    description: str,
    inside: Layer = contextlib.nullcontext,
    on_batch: Callable[[int], None] = lambda _: None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> None:
    """Give every batch's logits, as the model gives them when it is in memory whole.

    Args:
        streamed: The checkpoint.
        batches: What to run.
        take: Called with each batch's number and logits ``[rows, positions, vocabulary]``.
        directory: An existing directory, for what layers returned; nothing is left there.
        description: What the progress bar says.
        inside: Makes a context that each decoder layer runs in, from its index; the layer's
            weights are in memory then.
        on_batch: Called with a batch's number before a layer runs it.
        limit_bytes: Memory for what layers returned; the rest is read from files.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    skeleton = streamed.skeleton
    count = len(skeleton.layers)
    before: LayerOutputs | None = None
    folder = directory / "layer-outputs"
    with (
        quiet_transformers(),
        skeleton.outer(),
        counting((count + 1) * len(batches), description) as advance,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        for index in range(count):
            # Those of the layer before are in memory too.
            (folder / str(index)).mkdir(parents=True)
            outputs = LayerOutputs(folder / str(index), limit_bytes // 2)
            with (
                skeleton.layer(index),
                inside(index),
                only_layer(skeleton.decoder, skeleton.layers, index) as run,
            ):
                earlier = itertools.repeat(None) if before is None else iter(before)
                for number, (batch, given) in enumerate(zip(batches, earlier, strict=False)):
                    on_batch(number)
                    outputs.append(run(batch.inputs, given))
                    advance()
            outputs.finish()
            before = outputs
            if index:
                shutil.rmtree(folder / str(index - 1))
        assert before is not None
        with skeleton.head(), only_head(skeleton.model, skeleton.layers) as finish:
            for number, (batch, given) in enumerate(zip(batches, before, strict=True)):
                arguments = {**batch.inputs, "logits_to_keep": batch.logits_to_keep}
                take(number, finish(arguments, given).logits)
                advance()
