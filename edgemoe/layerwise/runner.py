"""The one pass over a model's decoder layers, which goes on where it was interrupted.

Each layer gets every batch before the next layer is held. What it returned goes to the next,
and with a work directory to the disk, beside what the task wants kept of the layer; the same
pass begins after the last finished layer then.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from edgemoe.layerwise.activation_peaks import see_outputs, watched
from edgemoe.layerwise.batch import digest_batches
from edgemoe.layerwise.finished_layers import FinishedLayers, outputs_name
from edgemoe.layerwise.outputs import DEFAULT_LIMIT_BYTES, LayerOutputs
from edgemoe.layerwise.replay import only_head, only_layer
from edgemoe.layerwise.returned import map_tensors
from edgemoe.models.loading import quiet_transformers
from edgemoe.progress import counting, track

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from edgemoe.layerwise.batch import Batch
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.layerwise.returned import Outputs
    from edgemoe.resume import WorkDirectory


@dataclass
class Visit:
    """One decoder layer, its weights in memory, and the batches that have come to it.

    Attributes:
        index: Which decoder layer.
        before: What the layer before it returned for each batch, to be read as often as
            needed; None each for the first layer.
        returned: What it gives to the next layer for each batch, once `send_on` was
            called.
    """

    provider: LayerProvider
    batches: Sequence[Batch]
    index: int
    before: Iterable[Outputs]
    returned: LayerOutputs = field(default_factory=lambda: LayerOutputs(None))

    def run(self, on_batch: Callable[[int], None] = lambda _: None) -> Iterator[Outputs]:
        """Run the layer as it is now on every batch.

        Args:
            on_batch: Called with a batch's number before it runs.

        Yields:
            What the layer returns for each batch, on its device.

        Raises:
            StreamingError: The family cannot be run layer by layer.
        """
        return run_layer(self.provider, self.index, self.batches, self.before, on_batch)

    def send_on(
        self,
        outputs: Iterable[Outputs],
        on_batch: Callable[[], None] = lambda: None,
        *,
        stored: bool = True,
    ) -> int:
        """Decide what the next layer is given.

        Args:
            outputs: For each batch.
            on_batch: Called after each of them.
            stored: Whether there is a next layer.

        Returns:
            How many there were.
        """
        count = 0
        with contextlib.ExitStack() as stack:
            if isinstance(outputs, Generator):
                # It holds the layer's own forward, which must be back whatever happens here.
                stack.callback(outputs.close)
            for one in outputs:
                if stored:
                    self.returned.append(map_tensors(one, lambda tensor: tensor.cpu()))
                on_batch()
                count += 1
        self.returned.finish()
        return count


def run_layer(
    provider: LayerProvider,
    index: int,
    batches: Sequence[Batch],
    before: Iterable[Outputs],
    on_batch: Callable[[int], None] = lambda _: None,
) -> Iterator[Outputs]:
    """Run one decoder layer, whose weights are in memory, on batches.

    Args:
        provider: The model.
        index: Which layer.
        batches: The batches.
        before: What the layer before it returned for each; None each for the first.
        on_batch: Called with a batch's number before it runs.

    Yields:
        What it returns for each batch, on its device.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    device = provider.device
    with only_layer(provider.decoder, provider.layers, index) as run:
        for number, (batch, given) in enumerate(zip(batches, before, strict=True)):
            on_batch(number)
            there = map_tensors(given, lambda tensor: tensor.to(device))
            yield run(batch.inputs(device), there)


class LayerTask:
    """What a pass does to each decoder layer. A subclass overrides what it needs.

    As it is, it runs every batch through every layer and keeps nothing.

    Attributes:
        watches: Whether it leaves `visit` as it is, and so changes nothing of what layers
            return. A model in memory then runs each batch as a whole, which is faster, and
            possible where its layers cannot be run one by one; the bits are the same.
    """

    watches = False

    def before_batch(self, number: int) -> None:
        """Be told which batch runs next.

        Args:
            number: Of the batch.
        """

    def visit(self, visit: Visit) -> Iterable[Outputs]:
        """Do to a layer what the pass is for.

        Args:
            visit: The layer.

        Returns:
            What the next layer is given for each batch; nothing where none follows.
        """
        return visit.run(self.before_batch)

    def state(self, index: int) -> dict[str, torch.Tensor]:
        """Return what must not be lost of a layer that is finished, by name.

        Args:
            index: Of the decoder layer.
        """
        del index
        return {}

    def restore(self, index: int, read: Callable[[], Mapping[str, torch.Tensor]]) -> None:
        """Take what an earlier process kept of a finished layer; called in their order.

        Args:
            index: Of the decoder layer.
            read: Reads what `state` returned.
        """


class LayerPass:
    """Batches on their way through the decoder layers of a model.

    Attributes:
        reached: Decoder layers that are finished: the index after that of the last one.
        before: What the last finished layer returned for each batch; None each at first.
    """

    def __init__(
        self,
        provider: LayerProvider,
        batches: Sequence[Batch],
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
    ) -> None:
        """Begin before the first layer.

        Args:
            provider: The model.
            batches: What runs.
            limit_bytes: Memory for what layers returned, where the rest can go into files.
        """
        self.provider = provider
        self.batches = batches
        self.reached = 0
        self.before: Iterable[Outputs] = [None] * len(batches)
        # What the layer before returned is in memory too.
        self._limit_bytes = limit_bytes // 2

    @contextlib.contextmanager
    def layer(self, index: int, work: WorkDirectory | None = None) -> Iterator[Visit]:
        """Hold the next layer.

        Args:
            index: Which.
            work: Where its outputs go that exceed the limit; None keeps all in memory.

        Yields:
            The layer; with the end of the block it is finished.
        """
        directory = None if work is None else work.empty_directory(outputs_name(index))
        returned = LayerOutputs(directory, self._limit_bytes)
        with self.provider.layer(index):
            yield Visit(self.provider, self.batches, index, self.before, returned)
        self.reached, self.before = index + 1, returned


def run_layers(
    provider: LayerProvider,
    batches: Sequence[Batch],
    task: LayerTask,
    *,
    description: str,
    layers: Sequence[int] | None = None,
    work: WorkDirectory | None = None,
    name: str = "",
    take: Callable[[int, torch.Tensor], None] | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
) -> None:
    """Visit decoder layers in order.

    Args:
        provider: The model.
        batches: What runs; none where the task looks at weights only.
        task: What to do to each layer.
        description: What the progress bar says.
        layers: Which layers, ascending; all of them, or with batches all up to the last.
        work: For what layers returned, and for their states; a pass that was interrupted goes
            on there. None keeps all in memory.
        name: What tells the pass from others that use the directory one after the other.
        take: Called with each batch's number and logits `[rows, positions, vocabulary]`.
            Nothing is left in the work directory then; states are, without it.
        limit_bytes: Memory for what layers returned, in a work directory.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    if provider.is_whole and task.watches:
        with watched(provider.layers):
            _run_whole(provider, batches, task, description, take)
        return
    chosen = range(len(provider.layers)) if layers is None else layers
    running = LayerPass(provider, batches, limit_bytes)
    finished = None if work is None else FinishedLayers(work, digest_batches(name, batches))
    done = 0 if finished is None else finished.recall(task.restore, chosen)
    left = chosen[done:]
    if finished is not None and done:
        running.reached, running.before = chosen[done - 1] + 1, finished.outputs()
    if not left and take is None:
        return
    each = max(len(batches), 1)
    total = each * (len(left) + (take is not None))
    outer = provider.outer() if batches else contextlib.nullcontext()
    with (
        quiet_transformers(),
        outer,
        counting(total, description) as advance,
    ):
        for index in left:
            is_last = take is None and index == chosen[-1]
            with running.layer(index, work) as visit, watched(provider.layers, index):
                seen = visit.send_on(task.visit(visit), advance, stored=not is_last)
            for _ in range(each - seen):
                advance()
            if finished is not None:
                finished.keep(index, task.state(index))
        if take is not None:
            with provider.head(), only_head(provider.model, provider.layers) as finish:
                for number, (batch, given) in enumerate(
                    zip(batches, running.before, strict=True)
                ):
                    there = map_tensors(given, lambda tensor: tensor.to(provider.device))
                    see_outputs(len(provider.layers) - 1, there)
                    arguments = batch.inputs(provider.device)
                    arguments["logits_to_keep"] = batch.logits_to_keep
                    take(number, finish(arguments, there).logits)
                    advance()
    if finished is not None and take is not None:
        finished.remove()


def _run_whole(
    provider: LayerProvider,
    batches: Sequence[Batch],
    task: LayerTask,
    description: str,
    take: Callable[[int, torch.Tensor], None] | None,
) -> None:
    model: Any = provider.model
    with torch.inference_mode():
        for number, batch in enumerate(track(batches, description)):
            task.before_batch(number)
            inputs = batch.inputs(provider.device)
            if take is None:
                # What is below the head is all that is wanted.
                model.base_model(**inputs)
            else:
                take(number, model(**inputs, logits_to_keep=batch.logits_to_keep).logits)
