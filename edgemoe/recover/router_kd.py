"""router-kd: train the routers alone, by distillation from the model before compression.

https://arxiv.org/abs/2603.02217. With the next-token distributions p of the teacher and q of
the student at temperature T (1 in the paper), over all positions t of the training text::

    loss = T^2 mean_t sum_v p_t(v) (log p_t(v) - log q_t(v))

Everything but the routers is frozen. The paper trains one epoch of 3000 sequences of 512
tokens, 8 to a step, with a learning rate of 5e-5, which is the default here. Whether an expert
is chosen has no gradient; the gates of those that are chosen have one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.recover.method import Phase, RecoveryMethod, Training
from edgemoe.recover.trainable import router_parameters

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.options import RecoverOptions


def prepare(model: MoeModel, options: RecoverOptions) -> Training:
    """Make the routers trainable, and nothing else.

    Args:
        model: The model.
        options: Settled options.

    Returns:
        What trains.
    """
    routers = router_parameters(model)
    phase = Phase(steps=options.steps, names=frozenset(routers))
    return Training(parameters=routers, phases=(phase,))


ROUTER_KD = RecoveryMethod(
    name="router-kd",
    prepare=prepare,
    learning_rate=5e-5,
    kd_weight=1.0,
    needs_teacher=True,
    takes=frozenset({"temperature"}),
)
