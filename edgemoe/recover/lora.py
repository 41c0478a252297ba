"""lora: low-rank adapters on experts and linear layers, merged in the end (MoE-I², stage 3).

https://arxiv.org/abs/2411.01016, with LoRA (https://arxiv.org/abs/2106.09685) by `peft`: every
weight W of `edgemoe.recover.adapters` becomes W + (alpha / rank) B A, of which A and B
train, and which are added to W when the training is done. So the checkpoint keeps its shape.

MoE-I² tunes on instructions and does not tell rank or learning rate. Decided here: rank 16,
alpha twice the rank, learning rate 2e-4. Without a teacher the loss is the task's
cross-entropy; with one it is half that and half the divergence from the teacher, so that the
model learns the task and what the teacher knows besides (`kd_weight`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.recover.adapters import add_adapters
from edgemoe.recover.method import Phase, RecoveryMethod, Training

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.options import RecoverOptions


def prepare(model: MoeModel, options: RecoverOptions) -> Training:
    """Add adapters, and let them train.

    Args:
        model: The model; until the training is finished its layers cannot be viewed.
        options: Settled options.

    Returns:
        What trains.

    Raises:
        RecoveryError: `peft` cannot adapt a layer of the model.
    """
    adapters = add_adapters(model, options)
    phase = Phase(steps=options.steps, names=frozenset(adapters.parameters))
    return Training(
        parameters=adapters.parameters,
        phases=(phase,),
        finish=adapters.merge,
        extra_bytes=adapters.copied_bytes,
    )


LORA = RecoveryMethod(
    name="lora",
    prepare=prepare,
    learning_rate=2e-4,
    kd_weight=0.5,
    takes=frozenset({"kd_weight", "temperature", "rank", "alpha"}),
)
