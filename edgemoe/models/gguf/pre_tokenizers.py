"""How byte-level vocabularies split text before they merge: what `tokenizer.ggml.pre` names.

The expressions are those of the models' own tokenizer.json; which name means which is
llama.cpp's `llama-vocab.cpp`.
"""

from __future__ import annotations

from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Digits, PreTokenizer, Sequence, Split

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*",
)
_LLAMA3 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_QWEN2 = rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
_GPT4O = (
    rf"{_CASED[0]}{_CONTRACTIONS}?|{_CASED[1]}{_CONTRACTIONS}?|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_TEKKEN = rf"{_CASED[0]}|{_CASED[1]}|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    r"[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥ࠀ-一가-퟿]+", r"\p{N}")

# Expressions that split one after the other, and whether a piece that is a word is not merged.
_SPLITS: dict[str, tuple[tuple[str, ...], bool]] = {
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), ((_LLAMA3,), True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), ((_LLAMA3,), False)),
    **dict.fromkeys(("glm4", "glm5"), ((_LLAMA3,), True)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan"), ((_QWEN2,), False)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), ((_GPT4O,), False)),
    "tekken": ((_TEKKEN,), True),
    "deepseek-v3": (_DEEPSEEK3, False),
    "deepseek-coder": (_DEEPSEEK_CODER, False),
}  # fmt: skip
# GPT-2's own expression, with each digit apart or not.
_GPT2 = ("gpt-2", "phi-2", "olmo", "mpt", "gigachat", "trillion", "granite-docling")
_DIGITS = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b")
NAMES = tuple(sorted((*_SPLITS, *_GPT2, *_DIGITS)))
"""What `tokenizer.ggml.pre` may say."""


def make_pre_tokenizer(name: str) -> tuple[PreTokenizer, bool]:
    """Make what splits text into pieces, in which bytes are then merged.

    Args:
        name: One of `NAMES`.

    Returns:
        The pre-tokenizer, and whether a piece that is a word of the vocabulary is taken as it is.
    """
    if name in _GPT2:
        return ByteLevel(add_prefix_space=False, use_regex=True), False
    if name in _DIGITS:
        whole = ByteLevel(add_prefix_space=False, use_regex=True)
        return Sequence([Digits(individual_digits=True), whole]), False
    expressions, whole_words = _SPLITS[name]
    splits = [Split(Regex(expression), behavior="isolated") for expression in expressions]
    return (
        Sequence([*splits, ByteLevel(add_prefix_space=False, use_regex=False)]),
        whole_words,
    )
