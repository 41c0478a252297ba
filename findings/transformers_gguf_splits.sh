#!/usr/bin/env bash
# transformers splits the text of a GGUF vocabulary that it does not know as GPT-2 does, and says nothing.
#
# Versions:    transformers 5.24.0, gguf 0.19.0, tokenizers of that transformers
# Guess:       tokenizer.ggml.pre names how text is split before bytes are merged; a name that the reader does not
#              know is refused, as llama.cpp does ("unknown pre-tokenizer type"), or at least told.
# Behaviour:   "smollm" (each digit apart: SmolLM2, and StarCoder, Granite and Command R under other names), "deepseek-v3"
#              and "deepseek-llm" are not in its table: text is split as "gpt-2" says. With "smollm" the last space
#              before a number is parted from the others, so code with numbers behind an indent gets other tokens.
# Output seen: smollm: ['a', 'Ġ', 'Ġ', '1', '2'] (right: ['a', 'ĠĠ', '1', '2']); a name that nobody knows: no error
# For edgemoe: it makes the tokenizer itself and refuses a name that it does not know (edgemoe/models/gguf).
set -euo pipefail
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install -qq --no-compile --disable-pip-version-check \
    transformers==5.24.0 gguf==0.19.0 torch==2.13.0 numpy==2.4.6 accelerate==1.15.0
cd "$work"
HF_HUB_OFFLINE=1 "$work/venv/bin/python" -I -W ignore - 2>"$work/log" <<'PY' || { tail -n 20 "$work/log" >&2; exit 1; }
import gguf
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

words = ["<s>", "</s>", *bytes_to_unicode().values(), "ĠĠ"]
merges = ["Ġ Ġ"]


def tokens(pre, text):
    writer = gguf.GGUFWriter("model.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(words)
    writer.add_token_types([3, 3] + [1] * (len(words) - 2))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_embedding_length):
        add(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return AutoTokenizer.from_pretrained(".", gguf_file="model.gguf").tokenize(text)


# SmolLM2's own tokenizer.json: digits apart, then GPT-2's expression.
right = Tokenizer(BPE({word: index for index, word in enumerate(words)}, [tuple(merges[0].split())]))
right.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)])
want = right.encode("a  12").tokens
print("transformers", transformers.__version__)
got = tokens("smollm", "a  12")
print("smollm:", got, "right:", want)
assert got != want, "smollm is split right now"
assert got == tokens("gpt-2", "a  12"), "split in a third way"
print("a name that nobody knows:", tokens("no-such-name", "a  12"))
PY
