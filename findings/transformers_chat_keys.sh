#!/usr/bin/env bash
# transformers changes the messages of a chat before the model's template sees them.
#
# Versions:    transformers 5.24.0, jinja2 3.1.6, tokenizers 0.23.1
# Guess:       apply_chat_template hands the messages to the template as they are.
# Behaviour:   A key whose value is None is gone, so "x in message" answers otherwise. A message with `reasoning`, as
#              servers return it, has `reasoning_content` and `thinking` too; a value that is no JSON, such as bytes,
#              is a text like "<bytes>" by then.
# Output seen: content, reasoning, reasoning_content, role, thinking | True | <bytes>
# For edgemoe: a bundle's template is rendered on a device without transformers: the same is done there, or prompts
#              of tool calls and of reasoning models differ from those that the model was trained on.
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    transformers==5.24.0 jinja2==3.1.6 tokenizers==0.23.1 numpy==2.4.6
cd "$work"
HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error "$work/venv/bin/python" -I -W ignore - <<'PY'
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a"))
)
tokenizer.chat_template = (
    "{{ messages[0] | list | sort | join(', ') }} | "
    "{{ messages[0].thinking == messages[0].reasoning }} | {{ messages[1].content }}"
)
chat = [
    {"role": "assistant", "content": "Yes.", "reasoning": "Both hold.", "name": None},
    {"role": "user", "content": b"bytes"},
]
seen = tokenizer.apply_chat_template(chat, tokenize=False)
print(seen)
assert seen == "content, reasoning, reasoning_content, role, thinking | True | <bytes>"
PY
echo "the template sees other keys than the messages have"
