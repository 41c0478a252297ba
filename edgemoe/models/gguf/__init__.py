"""GGUF files as checkpoints: llama.cpp's names, keys and blocks turned into Hugging Face's.

The facts (keys, tensor names, order of rotated heads, tokenizers) are those of llama.cpp's
conversion script and of gguf-py; what a file says is honoured, or it is refused by name.
"""
