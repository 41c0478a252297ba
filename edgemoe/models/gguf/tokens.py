"""The tokenizer of a GGUF file, as tokenizer.json says it.

transformers' own converter (5.20 to 5.24) splits text as GPT-2 does where it does not know what
`tokenizer.ggml.pre` names, and says nothing; here such a name is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from edgemoe.errors import CheckpointError
from edgemoe.models.gguf.pre_tokenizers import make_pre_tokenizer
from edgemoe.models.gguf.token_settings import PREFIX, adds_bos, read_key, token_of

if TYPE_CHECKING:
    from edgemoe.models.gguf.container import Container

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
_SPACE = "▁"


def make_tokenizer(container: Container) -> str:
    """Make the tokenizer that a file describes.

    Args:
        container: The file's header, which `token_settings` has looked at.

    Returns:
        Content of tokenizer.json.

    Raises:
        CheckpointError: Its vocabulary contradicts itself.
    """
    vocabulary = _Vocabulary(container)
    kind = read_key(container, "model", str, "")
    made = vocabulary.byte_level() if kind == "gpt2" else vocabulary.sentence_pieces()
    vocabulary.add_special(made)
    if adds_bos(container):
        bos = token_of(container, "bos_token_id")
        made.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A",
            pair=f"{bos} $A {bos}:1 $B:1",
            special_tokens=[(bos, read_key(container, "bos_token_id", int, 0))],
        )
    return str(made.to_str(pretty=False))


class _Vocabulary:
    def __init__(self, container: Container) -> None:
        self._container = container
        self._tokens: list[str] = self.get("tokens", list, [])
        self._types: list[int] = self.get("token_type", list, [1] * len(self._tokens))
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        if len(self._ids) != len(self._tokens):
            pairs = enumerate(self._tokens)
            twice = next(token for index, token in pairs if self._ids[token] != index)
            raise CheckpointError(
                f"{PREFIX}tokens must hold each token once, got {twice!r:.60} again in "
                f"{container.path}. Convert it again."
            )

    def get(self, key: str, kind: type, default: Any) -> Any:
        return read_key(self._container, key, kind, default)

    def byte_level(self) -> Tokenizer:
        """Make a byte-level tokenizer, as GPT-2's."""
        splitter, whole_words = make_pre_tokenizer(self.get("pre", str, ""))
        tokenizer = self._merging(self._listed_merges(), ignore_merges=whole_words)
        tokenizer.pre_tokenizer = splitter
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer

    def sentence_pieces(self) -> Tokenizer:
        """Make a tokenizer of SentencePiece's BPE: merges follow from the scores of words."""
        scores = self.get("scores", list, [])
        if len(scores) != len(self._tokens):
            raise CheckpointError(
                f"{PREFIX}scores must have one number for each of {len(self._tokens)} tokens, "
                f"got {len(scores)} in {self._container.path}. Download it again."
            )
        unknown = token_of(self._container, "unknown_token_id") or next(
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
        return tokenizer

    def _merging(self, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
        try:
            return Tokenizer(BPE(vocab=self._ids, merges=merges, **options))
        except Exception as error:  # the library raises Exception itself
            raise CheckpointError(
                f"the vocabulary of {self._container.path} must fit its merges, got: "
                f"{error!s:.100}. Download it again."
            ) from error

    def _listed_merges(self) -> list[tuple[str, str]]:
        found = []
        for merge in self.get("merges", list, []):
            left, _, right = str(merge).partition(" ")
            found.append((left, right))
        return found

    def _merges_of(self, scores: list[float]) -> list[tuple[str, str]]:
        if f"{PREFIX}merges" in self._container.metadata:
            return self._listed_merges()
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
