from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from edgemoe.data_provenance import digest_line, read_digests
from edgemoe.errors import OutputError, RecoveryError, TaskFileError
from edgemoe.evaluate.evaluation import evaluate
from edgemoe.evaluate.torch_scorer import TorchScorer
from edgemoe.models import load_model, load_tokenizer
from edgemoe.models.layers.factored import ranks_of
from edgemoe.models.tiny import VOCAB_SIZE, write_tiny_checkpoint
from edgemoe.recover.adapters import Adapters
from edgemoe.recover.options import RecoverOptions
from edgemoe.recover.recovery import recover_checkpoint
from edgemoe.resume import ResumableInterrupt, partial_path
from edgemoe.tasks import TaskFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe.models import MoeModel

QUICK = RecoverOptions(steps=10, batch_tokens=192, held_out_fraction=0.25, learning_rate=3e-3)


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def differing(first: MoeModel, second: MoeModel) -> set[str]:
    ours, theirs = first.model.state_dict(), second.model.state_dict()
    assert ours.keys() == theirs.keys()
    return {name for name in ours if not torch.equal(ours[name], theirs[name])}


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe", "ernie4_5_moe", "gpt_oss", "zaya"])
def test_router_kd_changes_routers_only_and_comes_nearer_to_the_teacher(
    family: str, compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed(family)
    options = replace(QUICK, learning_rate=3e-4)

    told = recover_checkpoint(
        small, [task], tmp_path / "out", method="router-kd", teacher=whole, options=options
    )

    before, after = load_model(small), load_model(tmp_path / "out")
    changed = differing(before, after)
    routers = {
        f"{layer.name}.{layer.spec.router}.{name}"
        for layer in before.layers
        for name, _ in layer.router.named_parameters()
    }
    assert changed <= routers
    assert {name.split(".")[2] for name in changed} == {str(x.index) for x in before.layers}
    # The choice has no gradient, so neither has its bias, whether a family trains it or not.
    assert not any("bias" in name and "correction" in name for name in changed)
    assert told.best_step > 0
    assert told.after.loss < told.before.loss
    assert told.after.loss == told.after.tasks["t"].divergence
    note = after.provenance
    assert note is not None
    assert (note["method"], note["seed"], note["best_step"]) == ("router-kd", 0, told.best_step)
    assert note["tasks"] == {"t": task.sha256}
    assert read_digests(note["training_lines"]) == {digest_line(r) for r in task.records}
    assert note["teacher_sha256"] == load_model(whole).sha256
    assert note["checkpoint_sha256"] == before.sha256
    assert note["after_training"]["loss"] == told.after.loss
    assert note["plan_sha256"] == note["before"]["plan_sha256"] == "0" * 64


def test_what_is_told_is_what_evaluate_tells_of_the_same_lines(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed("qwen2_moe", dtype=torch.bfloat16)

    told = recover_checkpoint(
        small, [task], tmp_path / "out", method="lora", teacher=whole, options=QUICK
    )

    held_out = replace(task, records=task.records[3::4])
    for path, quality in ((small, told.before), (tmp_path / "out", told.after)):
        model = load_model(path)
        assert model.stored_dtype == torch.bfloat16
        judged = evaluate(TorchScorer(model), held_out, load_tokenizer(path))
        assert quality.tasks["t"].perplexity == pytest.approx(judged.perplexity, rel=1e-4)
        assert told.to_dict()["tasks"]["t"]["held_out_lines"] == judged.n == 12
    found = told.after.tasks["t"]
    assert found.divergence is not None
    assert told.after.loss == 0.5 * found.divergence + 0.5 * found.cross_entropy


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("mixtral", "pruned"),
        ("glm4_moe", "ragged"),
        ("qwen2_moe", "factored"),
        ("gpt_oss", "ragged"),
        ("gpt_oss", "factored"),
    ],
)
@pytest.mark.parametrize("method", ["lora", "uncurl"])
def test_experts_of_every_kind_learn_the_task_and_keep_their_shape(
    family: str, kind: str, method: str, compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    _, small = compressed(family, kind=kind)

    told = recover_checkpoint(small, [task], tmp_path / "out", method=method, options=QUICK)

    before, after = load_model(small), load_model(tmp_path / "out")
    assert after.experts_per_layer == before.experts_per_layer == told.experts_per_layer
    assert [ranks_of(layer) for layer in after.layers] == [
        ranks_of(layer) for layer in before.layers
    ]
    assert read_bytes(small).keys() == read_bytes(tmp_path / "out").keys()
    changed = differing(before, after)
    if method == "lora":
        # uncurl's new routers need more steps than these to be better than the old ones.
        assert told.after.loss < told.before.loss
        assert any("down" in name for name in changed)
        assert any("q_proj" in name for name in changed)
    assert bool(changed) == (told.best_step > 0)
    if kind == "pruned":
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
        ids = torch.arange(3, 23)[None]
        with torch.no_grad():
            torch.testing.assert_close(
                stock.eval()(input_ids=ids).logits, after.model(input_ids=ids).logits
            )


def test_merged_adapters_are_what_was_trained(
    compressed: Any,
    task: TaskFile,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, small = compressed("glm4_moe", kind="factored")
    ids = torch.arange(5, 25)[None]
    models: list[MoeModel] = []
    seen: list[torch.Tensor] = []
    merge = Adapters.merge

    def load(path: Path) -> MoeModel:
        models.append(load_model(path))
        return models[-1]

    def watch(self: Adapters) -> None:
        with torch.no_grad():
            seen.append(models[0].model(input_ids=ids, use_cache=False).logits)
        merge(self)

    monkeypatch.setattr("edgemoe.recover.recovery.load_model", load)
    monkeypatch.setattr(Adapters, "merge", watch)

    recover_checkpoint(
        small,
        [task],
        tmp_path / "out",
        method="lora+router-kd",
        teacher=whole,
        options=replace(QUICK, kd_weight=0.5),
    )

    with torch.no_grad():
        found = load_model(tmp_path / "out").model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(found, seen[0], rtol=1e-4, atol=1e-4)


def test_what_does_not_help_is_not_written(
    compressed: Any, task: TaskFile, tmp_path: Path
) -> None:
    whole, small = compressed("mixtral", kind="ragged")

    told = recover_checkpoint(
        small,
        [task],
        tmp_path / "out",
        method="router-kd",
        teacher=whole,
        options=replace(QUICK, learning_rate=1.0, steps=3),
    )

    assert told.best_step == 0
    assert told.after == told.before
    assert differing(load_model(small), load_model(tmp_path / "out")) == set()
    assert not told.to_dict()["improved"]


def test_a_dense_teacher_and_several_tasks(
    compressed: Any, write_task: Callable[..., TaskFile], tmp_path: Path
) -> None:
    _, small = compressed("mixtral")
    dense = tmp_path / "dense"
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(dense)
    shutil.copy(small / "tokenizer.json", dense)
    tasks = [
        write_task(tmp_path / f"{name}.jsonl", name=name, seed=seed)
        for seed, name in enumerate(("a", "b"))
    ]

    told = recover_checkpoint(
        small, tasks, tmp_path / "out", method="lora+router-kd", teacher=dense, options=QUICK
    )

    assert told.before.tasks.keys() == {"a", "b"}
    divergences = [told.after.tasks[name].divergence for name in ("a", "b")]
    assert told.after.loss == sum(d or 0.0 for d in divergences) / 2 < told.before.loss


def test_refusals_come_first_and_leave_nothing(
    compressed: Any, task: TaskFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small = compressed("mixtral")
    other = write_tiny_checkpoint("mixtral", tmp_path / "other", vocab_size=80)
    words = json.loads((whole / "tokenizer.json").read_text())
    renamed = shutil.copytree(whole, tmp_path / "renamed")
    words["model"]["vocab"]["x95"] = words["model"]["vocab"].pop("w95")
    (renamed / "tokenizer.json").write_text(json.dumps(words))
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("edgemoe.recover.recovery.load_model", lambda _: pytest.fail("costly"))

    def refuse(error: type[Exception], match: str, **changes: Any) -> None:
        given = {"method": "router-kd", "teacher": whole, "options": QUICK, **changes}
        output = given.pop("output", tmp_path / "out")
        with pytest.raises(error, match=match):
            recover_checkpoint(given.pop("path", small), [task], output, **given)
        assert sorted(tmp_path.iterdir()) == before

    refuse(RecoveryError, "must be one of least-squares, lora", method="adam")
    refuse(RecoveryError, "router-kd must have a teacher, got none", teacher=None)
    refuse(RecoveryError, "another checkpoint than the model", teacher=small)
    refuse(RecoveryError, "as many logits as the model, got 80", teacher=other)
    refuse(RecoveryError, r"vocabulary, got 96 tokens .* differ in 'w95'", teacher=renamed)
    refuse(OutputError, "must not exist", output=whole)
    refuse(OutputError, "must not contain what is read", output=tmp_path, force=True)
    refuse(RecoveryError, "rank must not be given", options=replace(QUICK, rank=4))
    one = replace(task, records=task.records[:1])
    with pytest.raises(TaskFileError, match="two or more lines"):
        recover_checkpoint(small, [one], tmp_path / "out", method="lora", options=QUICK)
    monkeypatch.setattr("edgemoe.recover.recovery.free_bytes", lambda _: 1000)
    refuse(RecoveryError, r"must fit into memory, .* got 0.0 GB free")
    monkeypatch.undo()
    needed = 4 * sum(
        p.numel() for path in (whole, small) for p in load_model(path).model.parameters()
    )
    monkeypatch.setattr("edgemoe.recover.recovery.free_bytes", lambda _: needed + 1000)
    refuse(RecoveryError, "training with lora must fit into memory", method="lora")


def test_an_interrupted_training_goes_on_with_the_same_command_only(
    compressed: Any, task: TaskFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, small = compressed("mixtral")

    def recover(output: Path, **changes: Any) -> None:
        recover_checkpoint(
            small,
            [task],
            output,
            method="uncurl",
            teacher=whole,
            options=replace(QUICK, **changes),
        )

    recover(tmp_path / "once")
    original, taken = torch.optim.AdamW.step, 0

    def interrupt(self: torch.optim.AdamW, *arguments: Any) -> Any:
        nonlocal taken
        taken += 1
        if taken == 5:
            raise KeyboardInterrupt
        return original(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", interrupt)
    with pytest.raises(ResumableInterrupt, match="the same command goes on from there"):
        recover(tmp_path / "out")
    assert (
        json.loads((partial_path(tmp_path / "out") / "progress.json").read_text())["step"] == 4
    )
    with pytest.raises(OutputError, match="with another options"):
        recover(tmp_path / "out", seed=1)

    recover(tmp_path / "out")

    assert taken == 5 + 6
    assert read_bytes(tmp_path / "out") == read_bytes(tmp_path / "once")
    assert not partial_path(tmp_path / "out").exists()


def test_choices_are_judged_by_accuracy(compressed: Any, tmp_path: Path) -> None:
    _, small = compressed("qwen2_moe")
    lines = [
        {
            "prompt": f"w{n} w{n + 1}",
            "choices": [f" w{n + k}" for k in range(4)],
            "answer": n % 4,
        }
        for n in range(5, 85)
    ]
    file = tmp_path / "choices.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    task = TaskFile.load("t", file)

    told = recover_checkpoint(small, [task], tmp_path / "out", method="lora", options=QUICK)

    held_out = replace(task, records=task.records[3::4])
    for path, quality in ((small, told.before), (tmp_path / "out", told.after)):
        judged = evaluate(TorchScorer(load_model(path)), held_out, load_tokenizer(path))
        assert judged.metric == "accuracy"
        assert quality.tasks["t"].accuracy == judged.value
    assert told.to_dict()["tasks"]["t"]["accuracy_before"] == told.before.tasks["t"].accuracy
