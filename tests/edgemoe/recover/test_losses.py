from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from edgemoe.evaluate.scorer import Request
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models.tiny import tiny_config, tiny_model
from edgemoe.recover.losses import Batch, add_up, count_tokens

REQUESTS = [
    Request((5,), (tuple(range(10, 40)),)),
    Request((7, 8, 9), ((11, 12),)),
    Request((1, 2), (tuple(range(20, 70)),)),
]
CPU = torch.device("cpu")


def expected(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float
) -> tuple[float, float]:
    """Both sums in float64, sequence by sequence, token by token."""
    divergence = cross_entropy = 0.0
    for row, request in enumerate(REQUESTS):
        ids = [*request.context, *request.continuations[0]]
        for position in range(len(ids) - 1):
            theirs = teacher[row, position].double().numpy() / temperature
            ours = student[row, position].detach().double().numpy() / temperature
            log_p, log_q = log_softmax(theirs), log_softmax(ours)
            divergence += temperature**2 * float(np.sum(np.exp(log_p) * (log_p - log_q)))
            if position + 1 >= len(request.context):
                cross_entropy -= float(log_softmax(ours * temperature)[ids[position + 1]])
    return divergence, cross_entropy


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_sums_are_those_of_the_formulas(temperature: float) -> None:
    draw = torch.Generator().manual_seed(0)
    batch = Batch.of(REQUESTS, CPU)
    shape = (*batch.ids.shape, 80)
    student = (3 * torch.randn(shape, generator=draw)).requires_grad_()
    teacher = 3 * torch.randn(shape, generator=draw)

    sums = add_up(student, teacher, batch, temperature)

    divergence, cross_entropy = expected(student, teacher, temperature)
    assert sums.divergence.item() == pytest.approx(divergence, rel=1e-5)
    assert sums.cross_entropy.item() == pytest.approx(cross_entropy, rel=1e-5)
    assert count_tokens(REQUESTS) == (30 + 4 + 51, 30 + 2 + 50)
    # d/dz of T^2 KL(p || softmax(z / T)) is T (q - p).
    torch.autograd.backward(sums.divergence)
    q = torch.softmax(student.detach().double() / temperature, dim=-1)
    p = torch.softmax(teacher.double() / temperature, dim=-1)
    wanted = temperature * (q - p) * batch.valid[..., None]
    torch.testing.assert_close(student.grad, wanted.float(), rtol=1e-4, atol=1e-6)


def test_a_model_does_not_differ_from_itself_and_needs_no_teacher() -> None:
    batch = Batch.of(REQUESTS, CPU)
    logits = torch.randn(*batch.ids.shape, 80)

    assert add_up(logits, logits, batch).divergence.item() == 0
    alone = add_up(logits, None, batch)
    assert alone.divergence.item() == 0
    assert alone.cross_entropy.item() == add_up(logits, logits, batch).cross_entropy.item()


def test_the_cross_entropy_is_that_of_evaluate() -> None:
    model = tiny_model(tiny_config("mixtral")).requires_grad_(False)
    batch = Batch.of(REQUESTS, CPU)

    logits = model(input_ids=batch.ids, use_cache=False).logits
    found = add_up(logits, None, batch).cross_entropy.item()

    scored = TorchScorer(model).score(REQUESTS)
    assert found == pytest.approx(-sum(float(row[0].sum()) for row in scored), rel=1e-5)
