"""Run a model's decoder layers, one after the other, on the tokens that calibration read."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from edgemoe.calibrate.mixture import spread_windows
from edgemoe.errors import StatisticsError
from edgemoe.layerwise.batch import Batch
from edgemoe.layerwise.runner import LayerPass, run_layer
from edgemoe.models.hooks import observe
from edgemoe.models.loading import quiet_transformers
from edgemoe.models.routing.routers import Routing
from edgemoe.progress import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from torch import nn

    from edgemoe.calibrate.sample import Window
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.layerwise.returned import Outputs
    from edgemoe.layerwise.runner import Visit
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layers.layer import MoeLayer

    RouterCall = tuple[tuple[Any, ...], dict[str, Any]]

Job = TypeVar("Job")
Result = TypeVar("Result")

DEFAULT_TOKENS = 1024


@dataclass(eq=False)
class LayerView:
    """One MoE layer on all tokens, its weights in memory.

    Attributes:
        layer: The layer.
        hidden: What reaches its router and its experts, float32 [tokens, hidden].
        routing: What its router decides.
        router_calls: Arguments of the router, one call per window, where it follows none of
            the known rules and must be asked itself.
    """

    layer: MoeLayer
    hidden: torch.Tensor
    routing: Routing
    router_calls: Sequence[RouterCall] = ()
    _tensors: Mapping[str, torch.Tensor] | None = field(default=None, repr=False)

    def go_on_with(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the layers after this one see what it gives with other experts.

        Args:
            tensors: What `edgemoe.models.layers.layer.MoeLayer.replace` takes.
        """
        self._tensors = tensors


class JobMapper(Protocol):
    """Whoever runs an oracle's jobs elsewhere, on the same model."""

    def map(
        self,
        function: Callable[[LayerOracle, Job], Result],
        jobs: Sequence[Job],
        windows: Sequence[Window],
        description: str,
    ) -> list[Result]:
        """Run a function over jobs, each with an oracle over the windows.

        Args:
            function: A function of a module that workers can import.
            jobs: Its second arguments.
            windows: The tokens of the oracles.
            description: What the progress bar says.

        Returns:
            The results in the order of the jobs.
        """
        ...


class LayerOracle:
    """A model, and tokens to ask it about.

    Attributes:
        provider: Where its layers are.
        windows: The tokens, one forward pass each.
        pool: Who answers what `map` asks; None for this process.
    """

    def __init__(
        self, provider: LayerProvider, windows: Sequence[Window], pool: JobMapper | None = None
    ) -> None:
        """Ask about windows.

        Args:
            provider: The model; it is as before whenever nothing runs.
            windows: The tokens.
            pool: Workers with the same model.

        Raises:
            StatisticsError: There are none.
        """
        if not windows:
            raise StatisticsError(
                "statistics must hold tokens for a method that runs layers, got none. "
                "Calibrate again."
            )
        self.provider = provider
        self.windows = tuple(windows)
        self.batches = batches_of(self.windows)
        self.pool = pool
        self._answers: dict[Hashable, Any] = {}
        self._forget()

    @property
    def moe(self) -> MoeModel:
        """The model."""
        return self.provider.moe

    @property
    def tokens(self) -> int:
        """How many tokens there are."""
        return sum(len(window.ids) for window in self.windows)

    def fewer(self, tokens: int) -> LayerOracle:
        """Ask about fewer tokens.

        Args:
            tokens: How many, in [1, inf).

        Returns:
            An oracle over the same model and
            `edgemoe.calibrate.mixture.spread_windows` of the same tokens.
        """
        return LayerOracle(self.provider, spread_windows(self.windows, tokens), self.pool)

    def once(self, question: Hashable, ask: Callable[[], Result]) -> Result:
        """Remember an answer that depends on the model and the tokens alone.

        Plans of several fractions ask the same; each time may take minutes.

        Args:
            question: What is asked, with all that the answer depends on besides.
            ask: Finds the answer.

        Returns:
            The answer, which nobody may change.
        """
        if question not in self._answers:
            self._answers[question] = ask()
        answer: Result = self._answers[question]
        return answer

    def map(
        self,
        function: Callable[[LayerOracle, Job], Result],
        jobs: Sequence[Job],
        description: str,
    ) -> list[Result]:
        """Ask a question about several parts of the model, wherever it is answered.

        Args:
            function: A function of a module, from this oracle or its like to an answer. It runs
                in `open`, and leaves the model as it was.
            jobs: Its second arguments, best by rising layer.
            description: What the progress bar says.

        Returns:
            The answers in the order of the jobs: the same bits wherever they are from.

        Raises:
            SpreadError: Workers die, or cannot do what this process can.
            Exception: What the first job that failed raised.
        """
        if self.pool is not None:
            return self.pool.map(function, jobs, self.windows, description)
        self._forget()
        answers = []
        with self.open(), counting(len(jobs), description) as done:
            for job in jobs:
                answers.append(function(self, job))
                done()
        return answers

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Hold in memory what belongs to no layer.

        Yields:
            Nothing.
        """
        with quiet_transformers(), self.provider.outer():
            yield

    def states_before(self, index: int) -> list[Outputs]:
        """Run the layers before one, from where the last call ended.

        Args:
            index: Which decoder layer; in a block of `open`.

        Returns:
            What the layer before it returns for each window.

        Raises:
            StreamingError: The family cannot be run layer by layer.
        """
        if self._running.reached > index:
            self._forget()
        for number in range(self._running.reached, index):
            with self._running.layer(number) as visit:
                visit.send_on(visit.run())
        return list(self._running.before)

    @contextlib.contextmanager
    def visit(self, index: int) -> Iterator[LayerView]:
        """Visit one MoE layer of the unchanged model.

        Args:
            index: Which decoder layer; in a block of `open`.

        Yields:
            The layer, while its weights are in memory.

        Raises:
            StreamingError: The family cannot be run layer by layer.
        """
        (layer,) = (layer for layer in self.moe.layers if layer.index == index)
        self.states_before(index)
        with self._running.layer(index) as visit:
            returned, view = view_layer(visit, layer)
            visit.send_on(returned)
            yield view

    def _forget(self) -> None:
        """Begin with the first layer again: the model may have been changed."""
        self._running = LayerPass(self.provider, self.batches)

    def walk(self, description: str) -> Iterator[LayerView]:
        """Visit the MoE layers in order.

        Args:
            description: What the progress bar says.

        Yields:
            Each layer, while its weights are in memory.

        Raises:
            StreamingError: The family cannot be run layer by layer.
        """
        by_index = {layer.index: layer for layer in self.moe.layers}
        last = max(by_index)
        running = LayerPass(self.provider, self.batches)
        with self.open(), counting(last + 1, description) as done:
            for index in range(last + 1):
                layer = by_index.get(index)
                with running.layer(index) as visit:
                    if layer is None:
                        visit.send_on(visit.run())
                    else:
                        returned, view = view_layer(visit, layer)
                        yield view
                        if view._tensors is not None:
                            with layer.changed(view._tensors):
                                returned = list(visit.run())
                        visit.send_on(returned)
                done()

    def run_layer(self, index: int, before: Sequence[Outputs]) -> list[Outputs]:
        """Run one decoder layer, whose weights are in memory, on all windows.

        Args:
            index: Which.
            before: What the layer before it returned for each window; None for the first.

        Returns:
            What it returns for each window.
        """
        return list(run_layer(self.provider, index, self.batches, before))


def view_layer(visit: Visit, layer: MoeLayer) -> tuple[list[Outputs], LayerView]:
    """Run an MoE layer that is visited, and look at it.

    Args:
        visit: The visit.
        layer: The layer.

    Returns:
        What it returns for each batch, and what reached its experts and its router decided on
        all their tokens.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    calls: list[tuple[torch.Tensor, Routing]] = []
    asked: list[RouterCall] = []

    def keep(_: MoeLayer, hidden: torch.Tensor, routing: Routing, __: Any) -> None:
        calls.append((hidden.detach().clone(), routing))

    def keep_call(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        asked.append((arguments, options))

    with contextlib.ExitStack() as stack:
        stack.enter_context(observe(visit.provider.moe, keep))
        if layer.rule is None:
            hook = layer.router.register_forward_pre_hook(keep_call, with_kwargs=True)
            stack.callback(hook.remove)
        returned = list(visit.run())
    routing = Routing(
        torch.cat([found.logits for _, found in calls]),
        torch.cat([found.weights.float() for _, found in calls]),
        torch.cat([found.indices for _, found in calls]),
    )
    hidden = torch.cat([hidden for hidden, _ in calls])
    return returned, LayerView(layer, hidden, routing, tuple(asked))


def batches_of(windows: Sequence[Window]) -> list[Batch]:
    """Make a forward pass of each window.

    Args:
        windows: The tokens.

    Returns:
        The passes.
    """
    return [Batch(torch.tensor([window.ids])) for window in windows]


def inputs_of(window: Window) -> dict[str, Any]:
    """Return the decoder's arguments for a window.

    Args:
        window: The tokens.

    Returns:
        The arguments.
    """
    return {"input_ids": torch.tensor([window.ids]), "use_cache": False}
