"""Run one decoder layer of a model as the whole model would.

The model's own forward is called, so masks, rotary tables and what else a layer is given are
its own. Decoder layers before the one that runs answer at once: the last of them with what it
returned before, the others with not-a-number, and the call ends after the layer.

That is right wherever a decoder layer learns of the layers before it only through what the
layer just before returned, and through dictionaries that all layers are given, which get back
what layers left in them. Where a family does otherwise, it is noticed: a layer that changes
anything else that it was given (a cache, say), one that is given not-a-number, or layers that
run several times in one pass, end in `edgemoe.errors.StreamingError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, MutableMapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from edgemoe.errors import StreamingError
from edgemoe.layerwise.returned import Sharing, check_returned, map_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from edgemoe.layerwise.returned import Outputs, Shared

_DEPTH = 6


class _LayerDone(BaseException):
    """The layer has run; no handler in a model may take this for an error of its own."""

    def __init__(self, outputs: Outputs) -> None:
        super().__init__()
        self.outputs = outputs


class _Answers:
    """What layers answer that do not run: the last of them what it returned, others poison."""

    def __init__(self) -> None:
        self.last: Outputs = None
        self.shared: Shared = {}
        self._poison: Outputs = None

    def set(self, handed: Outputs) -> None:
        if isinstance(handed, Sharing):
            self.last, self.shared = handed.returned, handed.shared
        else:
            self.last, self.shared = handed, {}
        self._poison = map_tensors(self.last, _poisoned)

    def choose(self, is_last: bool) -> Callable[..., Outputs]:
        def answer_last(*_: Any, **options: Any) -> Outputs:
            for name, entries in self.shared.items():
                options[name].update(entries)
            return self.last

        def answer_poison(*_: Any, **__: Any) -> Outputs:
            return self._poison

        return answer_last if is_last else answer_poison


@contextlib.contextmanager
def only_layer(
    decoder: nn.Module, layers: nn.ModuleList, index: int
) -> Iterator[Callable[[Mapping[str, Any], Outputs], Outputs]]:
    """Let a model run one of its decoder layers.

    Args:
        decoder: What runs the layers, such as `model.get_decoder()`.
        layers: All decoder layers; the one that runs must have its weights.
        index: Which runs.

    Yields:
        A function from the decoder's arguments and what the layer before handed on for them
        (None for the first layer) to what this layer hands on.

    Raises:
        StreamingError: The decoder runs some of its layers several times.
    """
    _refuse_loops(decoder, layers)
    answers = _Answers()
    described = f"layer {index} ({type(layers[index]).__name__})"

    def run(*arguments: Any, **options: Any) -> Any:
        _refuse_poison(arguments, options, answers.last, index)
        given, versions = _describe_arguments(arguments, options), _versions(answers.shared)
        returned = own_forward(*arguments, **options)
        left = _describe_arguments(arguments, options)
        shared = _find_shared(options, given, left, answers.shared, described)
        if _versions(answers.shared) != versions:
            raise StreamingError(
                "a decoder layer must leave tensors of other layers as they are, got "
                f"{described}, which changes one in place."
            )
        returned = check_returned(returned, described)
        raise _LayerDone(Sharing(returned, shared) if shared else returned)

    own_forward = layers[index].forward
    with contextlib.ExitStack() as stack:
        for number in range(index):
            _replace_forward(layers[number], answers.choose(number == index - 1), stack)
        _replace_forward(layers[index], run, stack)

        def call(inputs: Mapping[str, Any], outputs_before: Outputs) -> Outputs:
            answers.set(outputs_before)
            try:
                # Not inference_mode: its tensors do not tell whether they were changed.
                with torch.no_grad():
                    decoder(**inputs)
            except _LayerDone as done:
                return done.outputs
            raise StreamingError(
                f"a decoder must run its layers in order, got {type(decoder).__name__}, which "
                f"did not run layer {index}."
            )

        yield call


def only_head(
    model: nn.Module, layers: nn.ModuleList
) -> contextlib.AbstractContextManager[Callable[[Mapping[str, Any], Outputs], Any]]:
    """Let a model run what follows its decoder layers.

    Args:
        model: The model; what is no decoder layer must have its weights.
        layers: All decoder layers.

    Returns:
        `from_layer` for the layer after the last.
    """
    return from_layer(model, layers, len(layers))


@contextlib.contextmanager
def from_layer(
    model: nn.Module, layers: nn.ModuleList, first: int
) -> Iterator[Callable[[Mapping[str, Any], Outputs], Any]]:
    """Let a model run all but its first decoder layers.

    Args:
        model: The model; what runs must have its weights.
        layers: All decoder layers.
        first: The first that runs, in [0, len(layers)].

    Yields:
        A function from the model's arguments and what the layer before handed on for them (None
        for the first layer) to what the model returns.

    Raises:
        StreamingError: The model runs some of its layers several times.
    """
    _refuse_loops(model, layers)
    answers = _Answers()
    with contextlib.ExitStack() as stack:
        for number in range(first):
            _replace_forward(layers[number], answers.choose(number == first - 1), stack)

        def call(inputs: Mapping[str, Any], outputs_before: Outputs) -> Any:
            answers.set(outputs_before)
            with torch.no_grad():
                output = model(**inputs)
            if _has_nan(output.logits) and not _has_nan(answers.last):
                raise StreamingError(
                    "what follows a decoder layer must depend only on what that layer "
                    f"returned, got {type(model).__name__}, which also reads outputs of "
                    "earlier layers."
                )
            return output

        yield call


def _refuse_loops(model: nn.Module, layers: nn.ModuleList) -> None:
    """Refuse models that go back to earlier layers: of these only the first round would run.

    transformers 5.24 announces them by a property of the configuration, which it counts
    `output_hidden_states` with.
    """
    config: Any = getattr(model, "config", None)
    visits = getattr(config, "total_num_hidden_layers", len(layers))
    if visits != len(layers):
        raise StreamingError(
            f"a model must run each of its {len(layers)} decoder layers once to be run layer "
            f"by layer, got {type(model).__name__}, which makes {visits} visits to them. "
            "Give it memory to be loaded whole (--memory-limit), and of methods choose one "
            "that reads statistics only, such as reap."
        )


def _replace_forward(
    module: nn.Module, forward: Callable[..., Any], stack: contextlib.ExitStack
) -> None:
    own = vars(module).get("forward")
    if own is None:
        stack.callback(delattr, module, "forward")
    else:
        stack.callback(setattr, module, "forward", own)
    module.forward = forward


def _poisoned(tensor: torch.Tensor) -> torch.Tensor:
    return torch.full_like(tensor, float("nan")) if tensor.is_floating_point() else tensor


def _has_nan(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() and bool(torch.isnan(value).any())
    if isinstance(value, (tuple, list)):
        return any(_has_nan(item) for item in value)
    return isinstance(value, Mapping) and any(_has_nan(item) for item in value.values())


def _refuse_poison(
    arguments: tuple[Any, ...], options: dict[str, Any], before: Outputs, index: int
) -> None:
    if _has_nan((arguments, options)) and not _has_nan(before):
        raise StreamingError(
            "a decoder layer must depend only on what the layer before it returned, got layer "
            f"{index}, which also reads outputs of earlier layers."
        )


def _find_shared(
    options: Mapping[str, Any],
    given: Mapping[str, Any],
    left: Mapping[str, Any],
    carried: Shared,
    layer: str,
) -> dict[str, dict[str, Outputs]]:
    """Find what a layer and those before it put into dictionaries that all layers are given."""
    shared: dict[str, dict[str, Outputs]] = {}
    # Its first argument is its own to change.
    changed = {n for n in given if n != "hidden_states" and given[n] != left[n]}
    for name in sorted(changed | carried.keys()):
        found = options.get(name)
        if (
            not isinstance(found, MutableMapping)
            or not all(isinstance(key, str) for key in found)
            or not found.keys() >= given[name].keys()
        ):
            raise StreamingError(
                "a decoder layer must pass on only what it returns and what it puts into "
                f"dictionaries of all layers, got {layer}, which changes its argument {name}."
            )
        old, new = given[name], left[name]
        keys = {key for key in new if old.get(key) != new[key]} | carried.get(name, {}).keys()
        shared[name] = {key: check_returned(found[key], layer) for key in sorted(keys)}
    return shared


def _versions(shared: Shared) -> list[int]:
    found: list[int] = []
    for entries in shared.values():
        for value in entries.values():
            map_tensors(value, lambda tensor: found.append(tensor._version))
    return found


def _describe_arguments(
    arguments: tuple[Any, ...], options: Mapping[str, Any]
) -> dict[str, Any]:
    described = {name: _describe(value) for name, value in options.items()}
    return {**described, "positional": _describe(arguments[1:])}


def _describe(value: Any, depth: int = _DEPTH) -> Any:
    """Reduce a value to what differs once somebody has changed it in place."""
    if isinstance(value, torch.Tensor):
        return (id(value), value._version)
    if isinstance(value, (str, bytes, int, float, bool, type(None))):
        return value
    if depth == 0 or isinstance(value, nn.Module):
        return id(value)
    if isinstance(value, Mapping):
        return {str(key): _describe(item, depth - 1) for key, item in value.items()}
    if isinstance(value, (tuple, list, set, frozenset)):
        return [_describe(item, depth - 1) for item in value]
    if hasattr(value, "__dict__"):
        return {key: _describe(item, depth - 1) for key, item in vars(value).items()}
    return id(value)
