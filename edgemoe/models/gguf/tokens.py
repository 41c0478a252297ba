"""The tokenizer of a GGUF file, as tokenizer.json says it.

transformers' own converter (5.20 to 5.24) splits text of a vocabulary whose `tokenizer.ggml.pre`
it does not know as GPT-2 does, and says nothing; here such a name is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.pre_tokenizers import NAMES, make_pre_tokenizer

if TYPE_CHECKING:
    from edgemoe.models.gguf.container import Container

_PREFIX = "tokenizer.ggml."
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
# Each of these ends an answer (llama.cpp's "end of generation").
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
_TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """What a file says of its vocabulary.

    Attributes:
        tokenizer: Content of tokenizer.json.
        config: Content of tokenizer_config.json.
        ids: Ids of special tokens, for config.json and generation_config.json.
        chat_template: The template; None where there is none.
        used: Keys that were read.
    """

    tokenizer: str
    config: dict[str, Any]
    ids: dict[str, Any]
    chat_template: str | None
    used: tuple[str, ...]


def read_tokens(container: Container) -> Tokens:
    """Read a file's vocabulary.

    Args:
        container: The file's header.

    Returns:
        What it says.

    Raises:
        CheckpointError: It is missing, contradicts itself, or is of a kind that is not read.
    """
    reader = _Vocabulary(container)
    kind = reader.get("model", str, "")
    if kind not in ("gpt2", "llama"):
        raise CheckpointError(
            f"{_PREFIX}model must be gpt2 (byte-level BPE) or llama (SentencePiece BPE), got "
            f"{kind!r:.40} in {container.path}. Use the Hugging Face checkpoint that the file was "
            "made from."
        )
    reader.refuse_set("remove_extra_whitespaces")
    reader.refuse_set("add_eos_token")
    tokenizer = reader.byte_level() if kind == "gpt2" else reader.sentence_pieces()
    reader.add_special(tokenizer)
    begins = reader.get("add_bos_token", bool, reader.adds_bos)
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": begins,
        "clean_up_tokenization_spaces": False,
    }
    config |= {name: reader.token(key) for name, key in _SPECIAL.items() if reader.token(key)}
    if begins:
        bos = reader.token("bos_token_id")
        if bos is None:
            raise CheckpointError(
                f"a GGUF that adds a token before a text must name it, got no "
                f"{_PREFIX}bos_token_id in {container.path}. Convert it again."
            )
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, reader.get("bos_token_id", int, 0))],
        )
    ends = [reader.get(key, int, None) for key in _ENDS]
    found = list(dict.fromkeys(end for end in ends if end is not None))
    ids: dict[str, Any] = {
        "bos_token_id": reader.get("bos_token_id", int, None),
        "pad_token_id": reader.get("padding_token_id", int, None),
        "eos_token_id": found[0] if len(found) == 1 else found or None,
    }
    template = container.metadata.get(_TEMPLATE)
    return Tokens(
        tokenizer=tokenizer.to_str(pretty=False),
        config=config,
        ids=ids,
        chat_template=template if isinstance(template, str) else None,
        used=(*reader.used, _TEMPLATE),
    )


class _Vocabulary:
    def __init__(self, container: Container) -> None:
        self._container = container
        self._used: set[str] = set()
        self.adds_bos = False
        tokens = self.get("tokens", list, [])
        types = self.get("token_type", list, [1] * len(tokens))
        texts = all(type(token) is str for token in tokens)
        if not tokens or not texts or len(types) != len(tokens):
            raise CheckpointError(
                f"{container.path} must list its vocabulary in {_PREFIX}tokens and a type of each, "
                f"got {len(tokens)} tokens and {len(types)} types. Download it again."
            )
        self._tokens: list[str] = tokens
        self._types: list[int] = types
        self._ids = {token: index for index, token in enumerate(tokens)}
        if len(self._ids) != len(tokens):
            twice = next(
                token for index, token in enumerate(tokens) if self._ids[token] != index
            )
            raise CheckpointError(
                f"{_PREFIX}tokens must hold each token once, got {twice!r:.60} again in "
                f"{container.path}. Convert it again."
            )

    @property
    def used(self) -> tuple[str, ...]:
        return tuple(self._used)

    def get(self, key: str, kind: type, default: Any) -> Any:
        whole = f"{_PREFIX}{key}"
        self._used.add(whole)
        found = self._container.metadata.get(whole, default)
        if found is not default and type(found) is not kind:
            raise CheckpointError(
                f"{whole} must be of type {kind.__name__}, got {found!r:.60} in "
                f"{self._container.path}. Download it again."
            )
        return found

    def token(self, key: str) -> str | None:
        index = self.get(key, int, None)
        if index is None:
            return None
        if not 0 <= index < len(self._tokens):
            raise CheckpointError(
                f"{_PREFIX}{key} must be one of {len(self._tokens)} tokens, got {index} in "
                f"{self._container.path}. Download it again."
            )
        return self._tokens[index]

    def refuse_set(self, key: str) -> None:
        if self.get(key, bool, False):
            raise CheckpointError(
                f"{_PREFIX}{key} must be false, got true in {self._container.path}: edgemoe's "
                "tokenizer does not do this. Use the Hugging Face checkpoint that the file was "
                "made from."
            )

    def byte_level(self) -> Tokenizer:
        """Make a byte-level tokenizer, as GPT-2's."""
        name = self.get("pre", str, "")
        if name not in NAMES:
            raise CheckpointError(
                f"{_PREFIX}pre must name how text is split ({', '.join(NAMES)}), got "
                f"{name!r:.40} in {self._container.path}. Use the Hugging Face checkpoint that "
                "the file was made from."
            )
        splitter, whole_words = make_pre_tokenizer(name)
        self.get("add_space_prefix", bool, False)
        merges = [tuple(merge.split(" ", 1)) for merge in self.get("merges", list, [])]
        tokenizer = self._merging(merges, ignore_merges=whole_words)
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        # What llama.cpp takes where the file does not say.
        self.adds_bos = name in (
            "llama3",
            "llama-v3",
            "llama-bpe",
            "falcon3",
            "pixtral",
            "tekken",
        )
        return tokenizer

    def sentence_pieces(self) -> Tokenizer:
        """Make a tokenizer of SentencePiece's BPE: merges follow from the scores of words."""
        self.get("pre", str, "")
        scores = self.get("scores", list, [])
        if len(scores) != len(self._tokens):
            raise CheckpointError(
                f"{_PREFIX}scores must have one number for each of {len(self._tokens)} tokens, got "
                f"{len(scores)} in {self._container.path}. Download it again."
            )
        unknown = self.token("unknown_token_id") or next(
            (
                token
                for token, kind in zip(self._tokens, self._types, strict=True)
                if kind == _UNKNOWN
            ),
            None,
        )
        tokenizer = self._merging(
            self._merges_of(scores), unk_token=unknown, fuse_unk=True, byte_fallback=True
        )
        prefix = self.get("add_space_prefix", bool, True)
        replace = normalizers.Replace(" ", _SPACE)
        tokenizer.normalizer = (
            normalizers.Sequence([normalizers.Prepend(_SPACE), replace]) if prefix else replace
        )
        tokenizer.decoder = decoders.Sequence(
            [
                decoders.Replace(_SPACE, " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                *([decoders.Strip(" ", 1, 0)] if prefix else []),
            ]
        )
        self.adds_bos = True
        return tokenizer

    def _merging(self, merges: list[tuple[str, ...]], **options: Any) -> Tokenizer:
        try:
            return Tokenizer(BPE(vocab=self._ids, merges=merges, **options))
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(
                f"the vocabulary of {self._container.path} must fit its merges, got: "
                f"{error!s:.100}. Download it again."
            ) from error

    def _merges_of(self, scores: list[float]) -> list[tuple[str, ...]]:
        if "tokenizer.ggml.merges" in self._container.metadata:
            return [tuple(merge.split(" ", 1)) for merge in self.get("merges", list, [])]
        ids, found = self._ids, []
        for index, token in enumerate(self._tokens):
            parts = [
                (ids[token[:cut]], ids[token[cut:]])
                for cut in range(1, len(token))
                if token[:cut] in ids and token[cut:] in ids
            ]
            found += [(-scores[index], index, left, right) for left, right in sorted(parts)]
        return [(self._tokens[left], self._tokens[right]) for *_, left, right in sorted(found)]

    def add_special(self, tokenizer: Tokenizer) -> None:
        """Keep control tokens and such that a user defined whole."""
        pairs = list(zip(self._tokens, self._types, strict=True))
        tokenizer.add_special_tokens(
            [
                AddedToken(token, normalized=False, special=True)
                for token, kind in pairs
                if kind in (_CONTROL, _UNKNOWN)
            ]
        )
        tokenizer.add_tokens(
            [
                AddedToken(token, normalized=False, special=False)
                for token, kind in pairs
                if kind == _USER_DEFINED
            ]
        )
