"""Tokens beyond the embedding are named before a model is loaded; unused ones are noted."""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING

import pytest
from tokenizers import Tokenizer

from edgemoe.errors import TaskFileError
from edgemoe.models.tiny import write_tiny_checkpoint
from edgemoe.tasks import TaskFile
from edgemoe.token_check import check_tokens, read_vocabulary_size

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose tokenizer knows a token more than the model."""
    folder = tmp_path_factory.mktemp("beyond") / "moe"
    write_tiny_checkpoint("qwen3_moe", folder)
    more = Tokenizer.from_file(str(folder / "tokenizer.json"))
    more.add_special_tokens(["<|tool|>"])
    more.save(str(folder / "tokenizer.json"))
    return folder


def write(folder: Path, *lines: object) -> Path:
    path = folder / "task.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.parametrize(
    "line",
    [
        {"text": "w1 <|tool|> w2"},
        {"prompt": "w1 <|tool|>", "completion": "w2"},
        {"prompt": "w1 ", "completion": "w2 <|tool|>"},
        {"prompt": "w1", "choices": [" w2", " <|tool|>"], "answer": 0},
    ],
)
def test_line_token_id_size_and_remedy_are_named(
    model: Path, tmp_path: Path, line: dict[str, object]
) -> None:
    fine = {key: "w3" if isinstance(value, str) else value for key, value in line.items()}
    if "choices" in fine:
        fine["choices"] = [" w4", " w5"]
    task = TaskFile.load("t", write(tmp_path, fine, line))

    with pytest.raises(TaskFileError) as refused:
        check_tokens(model, [task])

    size = read_vocabulary_size(model)
    message = str(refused.value)
    assert f"task.jsonl, line 2: tokens must be among the {size} " in message
    assert f"got '<|tool|>', which is token {size}." in message
    assert "resize_token_embeddings" in message


def test_tokens_that_nobody_uses_are_only_noted(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    task = TaskFile.load("t", write(tmp_path, {"text": "w1 w2"}))
    with caplog.at_level(logging.INFO, "edgemoe.api"):
        check_tokens(model, [task])

    assert "1 tokens more than the model has embeddings for" in caplog.text


def test_the_size_of_a_nested_configuration_is_that_of_its_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"vocab_size": 9, "text_config": {"vocab_size": 7}})
    )
    assert read_vocabulary_size(tmp_path) == 7
    (tmp_path / "config.json").write_text('{"vocab_size": "many"}')
    assert read_vocabulary_size(tmp_path) is None


def test_the_smallest_table_of_tokens_counts(tmp_path: Path) -> None:
    tables = {"vocab_size": 9, "vocab_size_per_layer_input": 7}
    for width, size in ((0, 9), (16, 7)):
        text = {**tables, "hidden_size_per_layer_input": width}
        (tmp_path / "config.json").write_text(json.dumps({"text_config": text}))
        assert read_vocabulary_size(tmp_path) == size


@pytest.mark.parametrize("command", ["calibrate", "evaluate", "sweep", "allocate", "recover",
                                     "export", "carve"])  # fmt: skip
def test_every_command_refuses_before_it_loads(
    model: Path, tmp_path: Path, command: str
) -> None:
    from click.testing import CliRunner

    from edgemoe.cli import main

    invoke: Callable[..., Result] = CliRunner().invoke
    path = write(tmp_path, *[{"text": f"w{n} <|tool|>"} for n in range(20)])
    more = {
        "sweep": ["--method=reap"],
        "recover": ["--method=lora"],
        "export": ["--target=cpu"],
    }.get(command, [])
    data = ["--data", str(path)] if command == "carve" else [f"--task=t={path}"]
    out = [] if command == "evaluate" else ["-o", str(tmp_path / "out")]
    result = invoke(main, [command, str(model), *data, *more, *out])

    assert result.exit_code == 1
    assert "line 1: tokens must be among" in result.stderr
    assert not (tmp_path / "out").exists()
