"""What `tokenizer.ggml.pre` may say, and which tokenizers split text alike.

Source: `llama-vocab.cpp` of llama.cpp.
"""

from __future__ import annotations

# Each name with a kind of splitting, and whether a piece that is a word is not merged.
KINDS: dict[str, tuple[str, bool]] = {
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), ("llama3", True)
    ),
    **dict.fromkeys(("glm4", "glm5"), ("llama3", True)),
    **dict.fromkeys(("dbrx", "smaug-bpe", "chatglm-bpe"), ("llama3", False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "hunyuan"), ("qwen2", False)),
    **dict.fromkeys(("stablelm2", "kormo"), ("qwen2", False)),
    **dict.fromkeys(("gpt-4o", "llama4", "kanana2", "minimax-m2"), ("gpt-4o", False)),
    "tekken": ("tekken", True),
    "deepseek-v3": ("deepseek-v3", False),
    "deepseek-coder": ("deepseek-coder", False),
    **dict.fromkeys(
        ("gpt-2", "phi-2", "olmo", "mpt", "gigachat", "trillion"), ("gpt-2", False)
    ),
    "granite-docling": ("gpt-2", False),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), ("digits", False)),
    **dict.fromkeys(("codeshell", "exaone", "minerva-7b"), ("digits", False)),
}
NAMES = tuple(sorted(KINDS))
"""Names that are read."""
ADDING_BOS = ("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral", "tekken")
"""Names with which llama.cpp puts a token before a text where the file does not say."""
