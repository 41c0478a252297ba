from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from edgemoe.models import adapt_model, load_model, load_tokenizer
from edgemoe.models.tiny import tiny_config, tiny_model
from edgemoe.recover.held_out import measure
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.registry import METHODS
from edgemoe.recover.samples import Batches, split_task
from edgemoe.recover.state import TrainingState
from edgemoe.recover.trainer import TrainingTask, learning_rate_factor, train
from edgemoe.resume import WorkDirectory

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeModel
    from edgemoe.tasks import TaskFile


def make_lesson(
    path: Path, task: TaskFile, method: str, teacher: Path | None = None, **given: Any
) -> tuple[TrainingTask, MoeModel]:
    model = load_model(path)
    options = RecoverOptions(batch_tokens=64, **given)
    options = METHODS[method].settle(options, has_teacher=teacher is not None)
    master = None if teacher is None else load_model(teacher).model
    samples = [split_task(task, load_tokenizer(path), held_out_fraction=0.25, max_length=64)]
    training_task = TrainingTask(
        method=METHODS[method],
        options=options,
        student=model,
        teacher=master,
        tasks=samples,
        training=METHODS[method].prepare(model, options),
        before=measure(model.model, master, samples, options),
    )
    return training_task, model


def begin(training_task: TrainingTask, path: Path) -> TrainingState:
    path.mkdir()
    state = TrainingState(WorkDirectory(path))
    state.save({"step": 0, "stale": 0, "before": training_task.before.to_dict()})
    return state


def copy_state(model: MoeModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def changed(model: MoeModel, before: dict[str, torch.Tensor]) -> set[str]:
    now = model.model.state_dict()
    return {name for name, tensor in now.items() if not torch.equal(tensor, before[name])}


def test_the_learning_rate_rises_and_falls_in_every_phase() -> None:
    factors = [learning_rate_factor(step, 100) for step in range(100)]

    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == sorted(factors[5:], reverse=True)
    assert 0 < factors[-1] < 0.001
    assert factors[5 + 47] == pytest.approx(0.5, abs=0.01)
    for steps in (1, 2, 3):
        assert all(0 < learning_rate_factor(step, steps) <= 1 for step in range(steps))


@pytest.mark.parametrize("family", ["glm4_moe", "gpt_oss", "nemotron_h", "phimoe"])
def test_gradients_of_what_loading_sets_are_those_of_eager_in_float64(family: str) -> None:
    # Few tokens: some experts are used by none, and their gradients must be zero, not garbage.
    ids = torch.tensor([[5, 17, 40]])
    gradients = {}
    for implementation in ("eager", None):
        model = tiny_model(tiny_config(family))
        if implementation is None:
            assert model.config._experts_implementation == "grouped_mm"
        else:
            model.double().config._experts_implementation = implementation
        model.requires_grad_(True)
        logits = model(input_ids=ids, use_cache=False).logits
        torch.autograd.backward(torch.log_softmax(logits.double(), -1)[0, :, 7].sum())
        gradients[implementation] = {n: p.grad for n, p in model.named_parameters()}

    eager, loaded = gradients["eager"], gradients[None]
    layers = adapt_model(tiny_model(tiny_config(family))).layers
    name = f"{layers[0].name}.{layers[0].spec.experts}.down_proj"
    assert any(not gradient.any() for gradient in eager[name])
    for name, gradient in eager.items():
        if gradient is None:
            assert loaded[name] is None or not loaded[name].any(), name
            continue
        scale = float(gradient.abs().max())
        torch.testing.assert_close(
            loaded[name].double(), gradient, rtol=0, atol=2e-4 * scale + 1e-12, msg=name
        )


def test_a_step_is_that_of_adamw_on_the_mean_over_its_tokens(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed("mixtral")
    training_task, _ = make_lesson(small, task, "router-kd", whole, steps=1, learning_rate=1e-2)
    twin, twin_model = make_lesson(small, task, "router-kd", whole, steps=1)
    requests = Batches(twin.tasks, 64, 0).draw()
    total, tokens = torch.zeros(()), 0
    parameters = twin.training.parameters
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for request in requests:
        ids = torch.tensor([[*request.context, *request.continuations[0]][:-1]])
        assert twin.teacher is not None
        p = twin.teacher(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        q = twin_model.model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        total = total + (p.exp() * (p - q)).sum()
        tokens += ids.shape[1]
    torch.autograd.backward(total / tokens)
    squares = sum(
        float(p.grad.square().sum()) for p in parameters.values() if p.grad is not None
    )
    assert squares > 0
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2, weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
    optimizer.step()

    train(training_task, begin(training_task, tmp_path / "work"))

    for name, parameter in training_task.training.parameters.items():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-3, atol=2e-5, msg=name)


def test_uncurl_trains_new_routers_alone_and_then_with_the_experts(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    _, small = compressed("glm4_moe")
    training_task, model = make_lesson(
        small, task, "uncurl", steps=6, router_steps=4, learning_rate=1e-2
    )
    assert [phase.steps for phase in training_task.training.phases] == [4, 2]
    given = copy_state(model)
    training_task.training.begin()
    drawn = copy_state(model)
    routers = {f"{layer.name}.gate.weight" for layer in model.layers}
    biases = {f"{layer.name}.gate.e_score_correction_bias" for layer in model.layers}
    experts = {
        f"{layer.name}.experts.{name}"
        for layer in model.layers
        for name in ("gate_up_proj", "down_proj")
    }
    assert changed(model, given) == routers | biases

    first = replace(
        training_task,
        training=replace(training_task.training, phases=training_task.training.phases[:1]),
    )
    train(first, begin(training_task, tmp_path / "first"))
    assert changed(model, drawn) == routers
    model.model.load_state_dict(drawn)
    train(training_task, begin(training_task, tmp_path / "both"))
    assert changed(model, drawn) == routers | experts


def test_a_training_without_gain_ends_early_and_one_that_explodes_at_once(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed("glm4_moe")
    training_task, _ = make_lesson(
        small, task, "router-kd", whole, steps=40, learning_rate=0.02
    )
    state = begin(training_task, tmp_path / "rough")
    train(training_task, state)
    steps, losses = zip(*state.progress["curve"], strict=True)
    lowest = losses.index(min(losses))
    assert state.progress["ended"] == f"no gain since step {steps[lowest]}"
    assert len(losses) == lowest + 1 + 5
    assert list(steps) == list(range(4, 4 * len(steps) + 1, 4))
    assert ("best_step" in state.progress) == (min(losses) < training_task.before.loss)

    training_task, model = make_lesson(small, task, "lora", steps=10)
    state = begin(training_task, tmp_path / "exploded")
    with torch.no_grad():
        next(iter(training_task.training.parameters.values())).fill_(math.inf)
    before = copy_state(model)
    train(training_task, state)
    assert state.progress["ended"] == "the loss of step 1 was no number"
    assert state.progress["step"] == 1
    assert "best_step" not in state.progress
    assert changed(model, before) == set()


def test_the_state_goes_on_bit_by_bit_from_any_step(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed("qwen2_moe")

    def run(folder: Path, stops: list[int]) -> dict[str, torch.Tensor]:
        folder.mkdir()
        for stop in stops:
            training_task, _ = make_lesson(
                small, task, "lora+router-kd", whole, steps=12, rank=2, learning_rate=1e-2
            )
            state = TrainingState(WorkDirectory(folder))
            if not state.progress:
                state.save({"step": 0, "stale": 0, "before": training_task.before.to_dict()})
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.optim.AdamW, "step", stop_before(stop))
                try:
                    train(training_task, state, checkpoint_seconds=0)
                except KeyboardInterrupt:
                    continue
        state.load_best(training_task.training.parameters)
        progress = json.loads((folder / "progress.json").read_text())
        assert progress["ended"] == "all steps" or progress["stale"] == 5
        assert {file.name for file in folder.iterdir()} == {
            "progress.json", progress["state_file"], progress["best_file"]
        }  # fmt: skip
        return {n: p.detach().clone() for n, p in training_task.training.parameters.items()}

    original = torch.optim.AdamW.step

    def stop_before(count: int) -> Callable[..., Any]:
        taken = 0

        def step(self: torch.optim.AdamW, *arguments: Any) -> Any:
            nonlocal taken
            if taken == count:
                raise KeyboardInterrupt
            taken += 1
            return original(self, *arguments)

        return step

    once = run(tmp_path / "once", [99])
    often = run(tmp_path / "often", [1, 3, 2, 99])

    assert all(torch.equal(once[name], often[name]) for name in once)
