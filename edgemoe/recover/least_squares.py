"""least-squares: the down projections of all experts, in closed form, layer after layer.

Layer by layer, so that what the compressed layers return comes nearest to what the teacher's
return. With y_t the teacher's output of decoder layer l for token t, y'_t the compressed
model's, behind its own changed layers, and Z what its experts' down projections D are given
(see `edgemoe.recover.down_projections`)::

    D <- D + C,    C = argmin || (Y - Y') - Z C ||_F^2 + r s || C ||_F^2

That is how channel pruning makes up for what it took away (He et al., 2017,
https://arxiv.org/abs/1707.06168, equation 3), on the compressed model's own stream as in
Zhang et al., 2015 (https://arxiv.org/abs/1505.06798, "asymmetric reconstruction"): a layer also
makes up for the layers before it. No gradient is needed. The strength r of the ridge is chosen
for every layer by held-out lines, and a layer that these do not find better stays as it was.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgemoe.recover.down_projections import routed_tensor, shared_modules
from edgemoe.recover.method import Phase, RecoveryMethod, Training
from edgemoe.recover.refit import refit

if TYPE_CHECKING:
    from torch import nn

    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.options import RecoverOptions


def prepare(model: MoeModel, options: RecoverOptions) -> Training:
    """Name the down projections.

    Args:
        model: The model.
        options: Not used.

    Returns:
        What changes: one step for each MoE layer.
    """
    del options
    wanted: set[int] = set()
    for layer in model.layers:
        wanted.add(id(routed_tensor(layer)))
        wanted |= {id(module.weight) for module in shared_modules(layer)}
    found: dict[str, nn.Parameter] = {
        name: parameter
        for name, parameter in model.model.named_parameters()
        if id(parameter) in wanted
    }
    phase = Phase(steps=len(model.layers), names=frozenset(found))
    return Training(parameters=found, phases=(phase,))


LEAST_SQUARES = RecoveryMethod(
    name="least-squares",
    prepare=prepare,
    run=refit,
    learning_rate=None,
    kd_weight=1.0,
    needs_teacher=True,
    max_tokens=8192,
)
