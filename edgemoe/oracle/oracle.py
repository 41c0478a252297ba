"""Run a model's decoder layers, one after the other, on the tokens that calibration read."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from edgemoe.calibrate.mixture import spread_windows
from edgemoe.errors import StatisticsError
from edgemoe.layerwise.replay import only_layer
from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.models.hooks import observe
from edgemoe.models.routers import Routing
from edgemoe.progress import counting

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from torch import nn

    from edgemoe.calibrate.sample import Window
    from edgemoe.layerwise.provider import LayerProvider
    from edgemoe.layerwise.replay import Outputs
    from edgemoe.models.contract import MoeModel
    from edgemoe.models.layer import MoeLayer

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
            tensors: What :meth:`edgemoe.models.layer.MoeLayer.replace` takes.
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
        crew: Who answers what :meth:`map` asks; None for this process.
    """

    def __init__(
        self, provider: LayerProvider, windows: Sequence[Window], crew: JobMapper | None = None
    ) -> None:
        """Ask about windows.

        Args:
            provider: The model; it is as before whenever nothing runs.
            windows: The tokens.
            crew: Workers with the same model.

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
        self.crew = crew
        self._answers: dict[Hashable, Any] = {}
        # A decoder layer, and what the one before it returns for each window.
        self._reached: tuple[int, list[Outputs]]
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
            :func:`edgemoe.calibrate.mixture.spread_windows` of the same tokens.
        """
        return LayerOracle(self.provider, spread_windows(self.windows, tokens), self.crew)

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
                in :meth:`open`, and leaves the model as it was.
            jobs: Its second arguments, best by rising layer.
            description: What the progress bar says.

        Returns:
            The answers in the order of the jobs: the same bits wherever they are from.

        Raises:
            SpreadError: Workers die, or cannot do what this process can.
            Exception: What the first job that failed raised.
        """
        if self.crew is not None:
            return self.crew.map(function, jobs, self.windows, description)
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
            index: Which decoder layer; in a block of :meth:`open`.

        Returns:
            What the layer before it returns for each window.

        Raises:
            StreamingError: The family cannot be run layer by layer.
        """
        if self._reached[0] > index:
            self._forget()
        reached, states = self._reached
        for number in range(reached, index):
            with self.provider.layer(number):
                states = self.run_layer(number, states)
            self._reached = (number + 1, states)
        return states

    @contextlib.contextmanager
    def visit(self, index: int) -> Iterator[LayerView]:
        """Visit one MoE layer of the unchanged model.

        Args:
            index: Which decoder layer; in a block of :meth:`open`.

        Yields:
            The layer, while its weights are in memory.

        Raises:
            StreamingError: The family cannot be run layer by layer.
        """
        (layer,) = (layer for layer in self.moe.layers if layer.index == index)
        before = self.states_before(index)
        with self.provider.layer(index):
            returned, view = self.observe(layer, before)
            self._reached = (index + 1, returned)
            yield view

    def _forget(self) -> None:
        """Begin with the first layer again: the model may have been changed."""
        self._reached = (0, [None] * len(self.windows))

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
        states: list[Outputs] = [None] * len(self.windows)
        with self.open(), counting(last + 1, description) as done:
            for index in range(last + 1):
                layer = by_index.get(index)
                with self.provider.layer(index):
                    if layer is None:
                        states = self.run_layer(index, states)
                    else:
                        returned, view = self.observe(layer, states)
                        yield view
                        if view._tensors is not None:
                            with layer.changed(view._tensors):
                                returned = self.run_layer(index, states)
                        states = returned
                done()

    def run_layer(self, index: int, before: Sequence[Outputs]) -> list[Outputs]:
        """Run one decoder layer, whose weights are in memory, on all windows.

        Args:
            index: Which.
            before: What the layer before it returned for each window; None for the first.

        Returns:
            What it returns for each window.
        """
        return run_windows(
            self.provider.decoder, self.provider.layers, index, self.windows, before
        )

    def view(self, layer: MoeLayer, before: Sequence[Outputs]) -> LayerView:
        """Look at one MoE layer, whose weights are in memory, on all windows.

        Args:
            layer: Which.
            before: As in :meth:`run_layer`.

        Returns:
            The layer, what reaches its experts, and what its router decides.
        """
        return self.observe(layer, before)[1]

    def observe(
        self, layer: MoeLayer, before: Sequence[Outputs]
    ) -> tuple[list[Outputs], LayerView]:
        """Run one MoE layer, whose weights are in memory, on all windows, and look at it.

        Args:
            layer: Which.
            before: As in :meth:`run_layer`.

        Returns:
            What it returns for each window, and what :meth:`view` returns.
        """
        calls: list[tuple[torch.Tensor, Routing]] = []
        asked: list[RouterCall] = []

        def keep(_: MoeLayer, hidden: torch.Tensor, routing: Routing, __: Any) -> None:
            calls.append((hidden.detach().clone(), routing))

        def keep_call(
            _: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]
        ) -> None:
            asked.append((arguments, options))

        with contextlib.ExitStack() as stack:
            stack.enter_context(observe(self.moe, keep))
            if layer.rule is None:
                hook = layer.router.register_forward_pre_hook(keep_call, with_kwargs=True)
                stack.callback(hook.remove)
            returned = self.run_layer(layer.index, before)
        routing = Routing(
            torch.cat([found.logits for _, found in calls]),
            torch.cat([found.weights.float() for _, found in calls]),
            torch.cat([found.indices for _, found in calls]),
        )
        hidden = torch.cat([hidden for hidden, _ in calls])
        return returned, LayerView(layer, hidden, routing, tuple(asked))


def run_windows(
    decoder: nn.Module,
    layers: nn.ModuleList,
    index: int,
    windows: Sequence[Window],
    before: Sequence[Outputs],
) -> list[Outputs]:
    """Run one decoder layer of any model on windows.

    Args:
        decoder: What runs the layers.
        layers: All of them; the one that runs must have its weights.
        index: Which runs.
        windows: The tokens.
        before: What the layer before it returned for each window; None for the first.

    Returns:
        What it returns for each window.

    Raises:
        StreamingError: The family cannot be run layer by layer.
    """
    with only_layer(decoder, layers, index) as run:
        return [
            run(inputs_of(window), given) for window, given in zip(windows, before, strict=True)
        ]


def inputs_of(window: Window) -> dict[str, Any]:
    """Return the decoder's arguments for a window.

    Args:
        window: The tokens.

    Returns:
        The arguments.
    """
    return {"input_ids": torch.tensor([window.ids]), "use_cache": False}
