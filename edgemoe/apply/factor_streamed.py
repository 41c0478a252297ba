"""Factor the layers of a checkpoint that is larger than memory, one after the other.

A layer's factors go into the work directory as soon as it is done, with what it returned for
the plan's tokens: an interrupted run goes on with the next layer.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from edgemoe.apply.expert_tensors import planned_tensors
from edgemoe.decompose.walk import FactoringWalk
from edgemoe.layerwise.outputs import LayerOutputs
from edgemoe.layerwise.provider import StreamedLayers
from edgemoe.models.checkpoint import quiet_transformers
from edgemoe.progress import counting
from edgemoe.staging import require_space

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from edgemoe.layerwise.replay import Outputs
    from edgemoe.models.opening import StreamedModel
    from edgemoe.plans.plan import Plan
    from edgemoe.resume import WorkDirectory

_PROGRESS = "factors-progress.json"


def factor_streamed(
    streamed: StreamedModel,
    plan: Plan,
    work: WorkDirectory,
    shapes: Mapping[int, Mapping[str, torch.Tensor]],
) -> None:
    """Factor every layer that has ranks.

    Args:
        streamed: The checkpoint.
        plan: Its plan, which was validated.
        work: Gets the factors, and has those of an earlier run.
        shapes: By decoder layer what its factors are like, in types and shapes; empty for one
            that stays whole.

    Raises:
        PlanError: The plan's method, options or tokens are refused.
        StreamingError: The method runs layers, and the family's cannot be run one by one.
        OutputError: The disk has not enough space.
    """
    skeleton = streamed.skeleton
    walk = FactoringWalk(streamed.moe, plan, planned_tensors, lambda: StreamedLayers(streamed))
    found = work.read(_PROGRESS)
    first = 0 if found is None else int(found["layers_done"])
    left = walk.indices[first:]
    if not left:
        return
    missing = (tensor for index in left for tensor in shapes.get(index, {}).values())
    require_space(work.path, sum(tensor.nbytes for tensor in missing))
    states: list[Outputs] = [None] * walk.windows
    if first and walk.windows:
        states = list(LayerOutputs.reopen(work.path / _outputs_name(first - 1)))
    outer = skeleton.outer() if walk.windows else contextlib.nullcontext()
    with quiet_transformers(), outer, counting(len(left), "factor experts") as advance:
        for number, index in enumerate(left, start=first):
            with skeleton.layer(index):
                step = walk.step(index, states)
            if step.factors is not None:
                _keep_factors(work, index, step.factors.tensors, shapes[index])
            states = step.returned
            if states:
                _keep_outputs(work, number, states)
            work.write(_PROGRESS, {"layers_done": number + 1})
            work.remove(_outputs_name(number - 1))
            advance()


def read_factors(work: WorkDirectory, index: int) -> dict[str, torch.Tensor]:
    """Read a layer's factors.

    Args:
        work: Where :func:`factor_streamed` put them.
        index: The decoder layer.

    Returns:
        What :func:`edgemoe.models.factored_layer.factor_layer` takes, in the types to be
        stored.
    """
    from safetensors.torch import load_file

    return load_file(work.path / _factors_name(index))


def _keep_factors(
    work: WorkDirectory,
    index: int,
    factors: Mapping[str, torch.Tensor],
    shapes: Mapping[str, torch.Tensor],
) -> None:
    from safetensors.torch import save

    stored = {name: tensor.to(shapes[name].dtype) for name, tensor in factors.items()}
    work.write_bytes(_factors_name(index), save(stored))


def _keep_outputs(work: WorkDirectory, number: int, states: Sequence[Outputs]) -> None:
    outputs = LayerOutputs(work.empty_directory(_outputs_name(number)))
    for returned in states:
        outputs.append(returned)
    outputs.finish()


def _factors_name(index: int) -> str:
    return f"factors-{index:05}.safetensors"


def _outputs_name(number: int) -> str:
    return f"outputs-{number:05}"
