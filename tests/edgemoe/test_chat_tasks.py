"""Task files of chats: rendered by the model's template, as transformers does it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from transformers import AutoTokenizer

from edgemoe.chat_tasks import load_task
from edgemoe.errors import TaskFileError
from edgemoe.tasks import CompletionRecord, TaskFile

if TYPE_CHECKING:
    from pathlib import Path

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('Unknown role ' + m.role) }}{% endif %}<|{{ m.role }}|>{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "user", "content": "Which bearing?"},
    {"role": "assistant", "content": "The left one."},
    {"role": "user", "content": "Sure?"},
    {"role": "assistant", "content": "Yes."},
]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    Tokenizer(WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")).save(
        str(tmp_path / "tokenizer.json")
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>",
              "eos_token": "</s>"}  # fmt: skip
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    return tmp_path


def write(model: Path, *lines: Any) -> Path:
    path = model / "chat.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def test_the_last_answer_is_the_completion(model: Path) -> None:
    task = load_task("chat", write(model, {"messages": CHAT}, {"messages": CHAT[:2]}), model)
    reference = AutoTokenizer.from_pretrained(model)

    assert task.kind == "completion"
    for record, chat in zip(task.records, (CHAT, CHAT[:2]), strict=True):
        assert isinstance(record, CompletionRecord)
        prompt = reference.apply_chat_template(
            chat[:-1], tokenize=False, add_generation_prompt=True
        )
        assert record.prompt == prompt
        assert record.calibration_text == reference.apply_chat_template(chat, tokenize=False)
        assert record.completion == chat[-1]["content"] + "</s>"


def test_an_answer_that_a_template_begins_otherwise_is_still_found(model: Path) -> None:
    """As templates of reasoning models do, which open a thought for an answer to come."""
    thinking = TEMPLATE.replace("%}<|assistant|>{%", "%}<|assistant|><think>{%")
    (model / "chat_template.jinja").write_text(thinking)
    (record,) = load_task("chat", write(model, {"messages": CHAT}), model).records

    assert isinstance(record, CompletionRecord)
    assert record.completion == "<|assistant|>Yes.</s>"


@pytest.mark.parametrize(
    ("lines", "rule"),
    [
        ([{"messages": CHAT}, {"prompt": "a", "completion": "b"}], "line 2: .* one kind"),
        ([{"messages": CHAT[:1]}], "line 1: .* two or more"),
        ([{"messages": CHAT[:3]}], "line 1: the last message must be the assistant's"),
        ([{"messages": "hello"}], 'line 1: "messages" must be a list'),
        ([{"messages": [{"content": "a"}, CHAT[1]]}], r'line 1: "messages"\[0\] must be'),
        ([{"messages": [{"role": "tool", "content": "a"}, CHAT[1]]}], "Unknown role tool"),
        ([{"messages": CHAT, "id": 3}], "line 1: unknown keys"),
        ([{"messages": [{"role": "user", "content": "\ud800"}, CHAT[1]]}], "lone surrogate"),
    ],
)
def test_bad_chats_are_refused_with_their_line(model: Path, lines: Any, rule: str) -> None:
    with pytest.raises(TaskFileError, match=rule):
        load_task("chat", write(model, *lines), model)


def test_without_a_template_the_file_is_refused_with_the_remedy(model: Path) -> None:
    path = write(model, {"messages": CHAT})
    with pytest.raises(TaskFileError, match="chat template of a model, got none here"):
        TaskFile.load("chat", path)
    (model / "chat_template.jinja").unlink()
    with pytest.raises(TaskFileError, match=r"got none in .*as prompt and completion"):
        load_task("chat", path, model)


def test_settings_may_come_from_elsewhere_than_a_directory(model: Path) -> None:
    """As those of a GGUF file, which has its template in its header."""
    path = write(model, {"messages": CHAT})
    template = b"{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    settings = b'{"eos_token": "<end>"}'
    files = {"chat_template.jinja": template, "tokenizer_config.json": settings}
    (record,) = load_task("chat", path, model / "model.gguf", files.get).records

    assert isinstance(record, CompletionRecord)
    assert record.completion == "Yes.<end>"
