"""uncurl: new routers for merged experts, trained alone and then with them (step 6).

https://arxiv.org/abs/2409.01483, Algorithm 1, after its merging. The router of every layer is
drawn anew, trained alone on the task "for a few steps", and then together with the experts.

What the paper leaves open, or what differs here, and why:

- The draw is the family's own: what its class does to a new router, with the configuration's
  `initializer_range`. Biases of the choice start at zero, since they balanced other experts.
  Tables of experts by token stay: nothing could learn them again.
- "A few steps": a quarter of all (`router_steps`).
- The second phase trains routers and routed experts; the rest stays frozen. The paper unfreezes
  everything, but trains on far more than a task file.
- Loss: cross-entropy on the task, as in the paper; where a teacher is given, half of it is the
  divergence from the teacher (`kd_weight`). No balancing loss: a task may use few experts.
- Learning rate: the paper's 1e-6 is for 50 epochs, too low for a router that starts from
  noise and has hundreds of steps. The default is 1e-4. Weight decay is the paper's 1e-3.
- Any checkpoint is taken, merged or not, with any top-k, shared experts and factored experts.

The result is judged against the checkpoint as it was given, with the router that it had.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from edgemoe.models.transformers_internals import draw_weights, mark_initialised
from edgemoe.recover.method import Phase, RecoveryMethod, Training
from edgemoe.recover.trainable import expert_parameters, router_parameters

if TYPE_CHECKING:
    from edgemoe.models.contract import MoeModel
    from edgemoe.recover.options import RecoverOptions


def prepare(model: MoeModel, options: RecoverOptions) -> Training:
    """Draw routers anew and make them trainable alone, then with the experts.

    Args:
        model: The model.
        options: Settled options.

    Returns:
        What trains.
    """
    routers, experts = router_parameters(model), expert_parameters(model)
    alone = options.router_steps or 0
    return Training(
        parameters={**routers, **experts},
        phases=(
            Phase(steps=alone, names=frozenset(routers)),
            Phase(steps=options.steps - alone, names=frozenset([*routers, *experts])),
        ),
        begin=partial(draw_routers, model, options.seed),
    )


@torch.no_grad()
def draw_routers(model: MoeModel, seed: int) -> None:
    """Draw every router's values as its family begins a training with them.

    Args:
        model: The model; its routers are changed in place, and nothing else.
        seed: Of the draw, which is the same on every device.
    """
    routers = {id(parameter) for parameter in router_parameters(model).values()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.layers:
            device = next(layer.block.parameters()).device
            layer.block.cpu()
            for tensor in (*layer.block.parameters(), *layer.block.buffers()):
                # transformers draws what has no such mark, as what came from a file has it.
                mark_initialised(tensor, initialised=id(tensor) not in routers)
            # A few families draw the router where they draw what is around it.
            for module in (layer.block, *layer.router.modules()):
                draw_weights(model.model, module)
            if layer.correction_bias is not None:
                layer.correction_bias.zero_()
            layer.block.to(device)


UNCURL = RecoveryMethod(
    name="uncurl",
    prepare=prepare,
    learning_rate=1e-4,
    kd_weight=0.5,
    takes=frozenset({"kd_weight", "temperature", "router_steps"}),
    weight_decay=1e-3,
)
