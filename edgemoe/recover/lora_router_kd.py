"""lora+router-kd: routers and adapters train together, by distillation.

Joins `router-kd` (https://arxiv.org/abs/2603.02217) and the adapters of MoE-I², stage 3
(https://arxiv.org/abs/2411.01016). Both train on one loss: by default the divergence from the
teacher alone, as the routers do in `router-kd`; with a `kd_weight` below 1 the rest of it is
the task's cross-entropy. Routers have a quarter of the adapters' learning rate, as the defaults
of the two methods have.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.recover.adapters import add_adapters
from edgemoe.recover.method import Phase, RecoveryMethod, Training
from edgemoe.recover.trainable import router_parameters

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.options import RecoverOptions

_ROUTER_RATE = 0.25


def prepare(model: MoeModel, options: RecoverOptions) -> Training:
    """Add adapters, and let them and the routers train.

    Args:
        model: The model; until the training is finished its layers cannot be viewed.
        options: Settled options.

    Returns:
        What trains.

    Raises:
        RecoveryError: `peft` cannot adapt a layer of the model.
    """
    routers = router_parameters(model)
    adapters = add_adapters(model, options)
    parameters = {**routers, **adapters.parameters}
    phase = Phase(steps=options.steps, names=frozenset(parameters))
    return Training(
        parameters=parameters,
        phases=(phase,),
        rates=dict.fromkeys(routers, _ROUTER_RATE),
        finish=adapters.merge,
        extra_bytes=adapters.copied_bytes,
    )


LORA_ROUTER_KD = RecoveryMethod(
    name="lora+router-kd",
    prepare=prepare,
    learning_rate=2e-4,
    kd_weight=1.0,
    needs_teacher=True,
    takes=frozenset({"kd_weight", "temperature", "rank", "alpha"}),
)
