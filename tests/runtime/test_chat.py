"""Chats are rendered as transformers renders them, in a sandbox."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from edgemoe_runtime.chat import ChatTemplate, read_named_tokens
from edgemoe_runtime.errors import BundleError, RequestError

if TYPE_CHECKING:
    from pathlib import Path

CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": 'Is 1 < 2 & "ä" a letter?', "name": None},
    {"role": "assistant", "content": "Yes.", "reasoning": "Both hold.",
     "tool_calls": [{"function": {"name": "look", "arguments": {"at": "Maß"}}}]},
    {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"a": ["<b>", 1]}}}]
# What published templates use, each alone and one after another.
TEMPLATES = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% for m in messages %}\n    {% if m.role == 'system' %}\n{{ m.content | trim }}\n"
    "    {%- endif %}\n{% endfor %}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}[{{ loop.index0 }}]{% endif %}{% endfor %}",
    "{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages[2].tool_calls | tojson }}",
    "{% set ns = namespace(last=-1, found=false) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{{ ns.last }}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m.role }},"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "{{ messages[2].reasoning_content }}|{{ messages[2].thinking }}|"
    "{{ 'name' in messages[1] }}",
    "{% macro say(m) %}<{{ m.role }}>{% endmacro %}{{ say(messages[0]) }}{{ dict(a=1)['a'] }}"
    "{{ messages | map(attribute='role') | join(',') }}{{ messages[::-1][0]['role'] }}",
    "{{ strftime_now('%Y') }}{{ enable_thinking is defined }}{{ unk_token }}"
    "{{ documents is none }}"
    "{{ messages[3].content is string }}{{ messages[3].content[0].text }}",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    words = {"a": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
    Tokenizer(WordLevel(words, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": {"content": "<s>", "__type": "AddedToken", "special": True},
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("number", range(len(TEMPLATES)))
@pytest.mark.parametrize("asks", [True, False])
def test_prompts_are_those_of_transformers(folder: Path, number: int, asks: bool) -> None:
    from transformers import AutoTokenizer

    (folder / "chat_template.jinja").write_text(TEMPLATES[number])
    reference = AutoTokenizer.from_pretrained(folder)
    wanted = reference.apply_chat_template(
        CHAT, tools=TOOLS, tokenize=False, add_generation_prompt=asks
    )
    template = ChatTemplate.load(folder)

    assert template is not None
    assert template.render(CHAT, tools=TOOLS, add_generation_prompt=asks) == wanted


def test_a_template_may_refuse_a_chat(folder: Path) -> None:
    refusing = "{{ raise_exception('Roles must alternate: ' + messages[0].role) }}"
    (folder / "chat_template.jinja").write_text(refusing)
    template = ChatTemplate.load(folder)

    assert template is not None
    with pytest.raises(RequestError, match="refused them: 'Roles must alternate: user'"):
        template.render([{"role": "user", "content": "x"}])


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
        "{{ raise_exception.__globals__['os'] }}",
    ],
)
def test_nothing_leads_out_of_the_sandbox(source: str) -> None:
    with pytest.raises(RequestError, match="chat template must"):
        ChatTemplate(source).render([{"role": "user"}])


def test_templates_of_older_checkpoints_lie_in_the_tokenizers_settings(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    for found in ("d", named):
        file.write_text(json.dumps({"chat_template": found}))
        template = ChatTemplate.load(folder)
        assert template is not None
        assert template.render([{"role": "user"}]) == "d"
    file.write_text("{}")
    assert ChatTemplate.load(folder) is None
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>"}}')
    assert read_named_tokens(folder) == {"eos_token": "<end>"}
    file.write_text('{"eos_token": "a", "eos_token": "b"}')
    with pytest.raises(BundleError, match="keys must differ"):
        ChatTemplate.load(folder)


@pytest.mark.parametrize(
    "messages", ["hello", [], [{"content": "x"}], ["x"], [{"role": 3}], None, {"role": "user"}]
)
def test_what_is_no_chat_is_refused(messages: Any) -> None:
    with pytest.raises(RequestError, match="messages"):
        ChatTemplate("{{ messages }}").render(messages)
    with pytest.raises(BundleError, match="must be Jinja"):
        ChatTemplate("{% for %}")
