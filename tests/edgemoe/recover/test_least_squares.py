from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgemoe.errors import RecoveryError
from edgemoe.models import load_model, save_model
from edgemoe.models.tiny import VOCAB_SIZE
from edgemoe.recover.down_projections import routed_tensor, shared_modules
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.recovery import recover_checkpoint
from edgemoe.recover.ridge import fit_change
from edgemoe.resume import partial_path

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeModel
    from edgemoe.tasks import TaskFile


def changed_names(first: MoeModel, second: MoeModel) -> set[str]:
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


def last_names(model: MoeModel) -> set[str]:
    wanted = {id(routed_tensor(layer)) for layer in model.layers}
    wanted |= {id(m.weight) for layer in model.layers for m in shared_modules(layer)}
    return {n for n, p in model.model.named_parameters() if id(p) in wanted}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", "pruned"),
        ("glm4_moe", "ragged"),  # a shared expert without a gate
        ("qwen2_moe", "pruned"),  # a shared expert with a gate
        ("qwen2_moe", "factored"),
        ("gpt_oss", "ragged"),  # transposed, with biases
        ("gemma4_text", "pruned"),  # norms follow the experts
        ("zaya", "pruned"),  # tokens that may use no expert
    ],
)
def test_only_last_matrices_change_and_the_teacher_comes_nearer(
    family: str, kind: str, compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed(family, kind=kind)

    told = recover_checkpoint(
        small, [task], tmp_path / "out", method="least-squares", teacher=whole
    )

    before, after = load_model(small), load_model(tmp_path / "out")
    changed = changed_names(before, after)
    assert changed
    assert changed <= last_names(before)
    assert told.unit == "layer"
    assert 0 < told.best_step <= told.steps == len(before.layers)
    assert told.after.loss < told.before.loss
    note = after.provenance
    assert note is not None
    assert note["method"] == "least-squares"
    assert not {"steps", "learning_rate", "batch_tokens"} & note["options"].keys()
    assert note["options"]["max_tokens"] == 8192


@pytest.mark.slow
def test_a_linear_loss_is_made_up_for_exactly(
    compressed: Any, write_task: Callable[..., TaskFile], tmp_path: Path
) -> None:
    """Halved last matrices are the only thing wrong, so the closed form puts them right."""
    whole, small = compressed("qwen2_moe", kind="pruned", num_hidden_layers=2)
    model = load_model(small)
    teacher = tmp_path / "teacher"
    teacher.mkdir()
    save_model(model, teacher, source=whole, provenance={})
    for layer in model.layers:
        routed_tensor(layer).data.mul_(0.5)
        for module in shared_modules(layer):
            module.weight.data.mul_(0.5)
    halved = tmp_path / "halved"
    halved.mkdir()
    save_model(model, halved, source=whole, provenance={})
    task = write_task(tmp_path / "long.jsonl", lines=400)

    told = recover_checkpoint(
        halved, [task], tmp_path / "out", method="least-squares", teacher=teacher
    )

    # The least ridge leaves a little.
    assert told.after.loss < 2e-3 * told.before.loss
    found, right = load_model(tmp_path / "out"), load_model(teacher)
    for ours, theirs in zip(found.layers, right.layers, strict=True):
        norm = routed_tensor(theirs).norm()
        assert (routed_tensor(ours) - routed_tensor(theirs)).norm() < 0.1 * norm


def test_what_was_interrupted_goes_on_to_the_same_bytes(
    compressed: Any, task: TaskFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small = compressed("glm4_moe", kind="ragged")

    def run(name: str) -> Any:
        return recover_checkpoint(
            small,
            [task],
            tmp_path / name,
            method="least-squares",
            teacher=whole,
            checkpoint_seconds=0,
        )

    run("at-once")
    calls: list[None] = []

    def failing(*arguments: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return fit_change(*arguments)

    monkeypatch.setattr("edgemoe.recover.refit.fit_change", failing)
    with pytest.raises(KeyboardInterrupt):
        run("twice")
    assert partial_path(tmp_path / "twice").is_dir()
    first = len(calls)
    run("twice")

    # The layer that was done is not done again.
    layers = len(load_model(small).layers)
    assert len(calls) - first == layers - 1
    for path in (tmp_path / "at-once").iterdir():
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes(), path.name
    assert not partial_path(tmp_path / "twice").exists()


def test_what_it_has_no_use_for_is_refused(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed("mixtral")

    def refused(pattern: str, **given: Any) -> None:
        arguments: dict[str, Any] = {"teacher": whole, **given}
        with pytest.raises(RecoveryError, match=pattern):
            recover_checkpoint(
                small, [task], tmp_path / "out", method="least-squares", **arguments
            )

    refused("steps must not be given for least-squares", options=RecoverOptions(steps=7))
    refused("rank must not be given", options=RecoverOptions(rank=7))
    refused("must have a teacher", teacher=None)
    other = tmp_path / "other"
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(other)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (whole / name).exists():
            (other / name).write_bytes((whole / name).read_bytes())
    refused("hidden size .* and its . decoder layers, got 16 and 1", teacher=other)
    assert not (tmp_path / "out").exists()


def test_tasks_have_equal_shares(
    compressed: Any, write_task: Callable[..., TaskFile], tmp_path: Path
) -> None:
    """A task four times as long as another, of the same text, weighs as much."""
    whole, small = compressed("mixtral")
    short = write_task(tmp_path / "a.jsonl", lines=12, name="a")
    twice = replace(short, name="b", records=short.records * 4)

    told = [
        recover_checkpoint(
            small, tasks, tmp_path / f"out{n}", method="least-squares", teacher=whole
        )
        for n, tasks in enumerate([[short], [short, twice]])
    ]

    one, both = (load_model(tmp_path / f"out{n}") for n in range(2))
    assert told[1].after.tasks.keys() == {"a", "b"}
    for ours, theirs in zip(one.layers, both.layers, strict=True):
        torch.testing.assert_close(
            routed_tensor(ours), routed_tensor(theirs), rtol=0.05, atol=0.01
        )
