"""What a session is asked for: types, ranges, stop strings by id, chats."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from edgemoe_runtime import BackendError, IntegrityError, RequestError, Session, verify_bundle
from edgemoe_runtime.bundle.file_entry import FileEntry
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest
from edgemoe_runtime.decoding.decoder import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from edgemoe_runtime.backends.base import LogitRows, TokenArray

    Build = Callable[..., Path]

LONE = "a\ud800"


@pytest.fixture(scope="module")
def session(bundles: dict[str, Path]) -> Any:
    with Session.open(bundles["concat"], threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    "arguments",
    [
        {"threads": 1000},
        {"threads": 0},
        {"threads": True},
        {"threads": 1.5},
        {"max_length": "8"},
        {"max_length": True},
        {"max_length": 0},
        {"k_cap": True},
        {"k_cap": "2"},
        {"deadline_ms": float("nan")},
        {"deadline_ms": "5"},
        {"deadline_ms": True},
        {"token_ms": -1},
        {"verify": 1},
        {"adapt": "yes"},
        {"task": b"model"},
        {"backend": 3},
        {"providers": "cpu"},
        {"providers": [1]},
    ],
)
def test_settings_of_a_wrong_type_or_range_are_refused(
    bundles: dict[str, Path], arguments: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="must"):
        Session.open(bundles["concat"], **arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"prompt": LONE},
        {"prompt": b"bytes"},
        {"prompt": None},
        {"prompt": 3},
        {"max_new_tokens": True},
        {"max_new_tokens": 0},
        {"max_new_tokens": 2.0},
        {"max_new_tokens": "3"},
        {"temperature": float("nan")},
        {"temperature": -0.1},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_p": None},
        {"top_k": 0},
        {"top_k": True},
        {"top_k": 2.5},
        {"seed": -1},
        {"seed": 1.0},
        {"seed": True},
        {"stop": ""},
        {"stop": [""]},
        {"stop": LONE},
        {"stop": b"x"},
        {"stop": [1]},
        {"stop": {"a": 1}},
        {"stream": 1},
    ],
)
def test_generations_of_a_wrong_type_or_range_are_refused(
    session: Session, arguments: dict[str, Any]
) -> None:
    with pytest.raises(RequestError, match="must"):
        session.generate(**{"prompt": "ab", **arguments})


def test_other_requests_are_checked_as_well(session: Session) -> None:
    wrong: Any
    for wrong in (LONE, b"x", None, 4):
        with pytest.raises(RequestError, match="must be"):
            session.classify(wrong, ["a", "b"])
        with pytest.raises(RequestError, match="must be"):
            session.score(wrong, "b")
        with pytest.raises(RequestError, match="must be"):
            session.score("a", wrong)
        with pytest.raises(RequestError, match="must"):
            session.encode(wrong)
        with pytest.raises(RequestError, match="must"):
            session.classify("x", ["a", wrong])
    for wrong in ([True, 2], [1.5, 2], ["1", 2], [-1, 2]):
        with pytest.raises(RequestError, match=r"ids\[0\] must be a whole number"):
            session.token_logprobs(wrong, 1)
    with pytest.raises(RequestError, match="start must be"):
        session.token_logprobs([1, 2], True)
    ids: Any = np.array([1, 2, 3])
    numpys = session.token_logprobs(ids, int(ids[0]))
    assert np.array_equal(numpys, session.token_logprobs([1, 2, 3], 1))
    assert session.generate("ab", max_new_tokens=np.int64(2), temperature=np.float32(0))  # type: ignore[call-overload]


def test_messages_repeat_little_of_a_long_argument(session: Session) -> None:
    with pytest.raises(RequestError) as refused:
        session.classify("x", ["y" * 100_000, "y" * 100_000])
    assert len(str(refused.value)) < 400


def test_a_special_token_as_stop_string_stops(session: Session) -> None:
    """Decoded text has no special token, so only its id can match."""
    seed = next(
        seed
        for seed in range(3000)
        if 256
        in session.generate("a", max_new_tokens=20, temperature=9.0, seed=seed).tokens[2:]
    )
    free = session.generate("a", max_new_tokens=20, temperature=9.0, seed=seed)
    place = free.tokens.index(256)
    for stream in (False, True):
        stopped: Any = session.generate(
            "a", max_new_tokens=20, temperature=9.0, seed=seed, stop="<eos>", stream=stream
        )
        text = "".join(stopped) if stream else stopped.text
        answer = stopped.generation if stream else stopped
        assert answer.finish_reason == "stop"
        assert answer.tokens == free.tokens[: place + 1]
        assert free.text.startswith(text.rstrip("\ufffd"))


def test_a_token_that_the_model_does_not_know_is_named(build_bundle: Build) -> None:
    folder = build_bundle()
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 257,
                                      "content": "<tool>"})  # fmt: skip
    relist(folder, "tokenizer.json", json.dumps(tokenizer).encode())
    with (
        Session.open(folder, threads=1) as session,
        pytest.raises(RequestError, match=r"in \[0, 257\).*got 257 \('<tool>'\)"),
    ):
        session.generate("a<tool>b")


def relist(folder: Path, name: str, content: bytes) -> None:
    """Write a file, and its digest into the manifest."""
    import hashlib

    (folder / name).write_bytes(content)
    manifest = load_manifest(folder)
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    files = {**manifest.files, name: entry}
    total = sum(one.size for one in files.values())
    save_manifest(
        replace(manifest, files=files, size=replace(manifest.size, total_bytes=total)), folder
    )


def test_a_chat_is_answered_as_its_rendered_prompt(
    build_bundle: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build_bundle()
    with (
        Session.open(folder) as session,
        pytest.raises(RequestError, match="template, got none"),
    ):
        session.chat([{"role": "user", "content": "hi"}])
    source = b"{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}:"
    relist(folder, "chat_template.jinja", source)
    with Session.open(folder, threads=1) as session:
        messages = [{"role": "user", "content": "hi"}]
        said = session.chat(messages, max_new_tokens=5)
        whole = session.generate("<user>hi:", max_new_tokens=5)
        assert not hasattr(said, "generation")
        assert said.tokens == whole.tokens
        pieces = "".join(session.chat(messages, max_new_tokens=5, stream=True))  # type: ignore[arg-type]
        assert pieces == whole.text
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with (
        Session.open(folder, threads=1) as session,
        pytest.raises(RequestError, match=r"pip install 'edgemoe\[chat\]'"),
    ):
        session.chat(messages)


def test_a_bundle_in_a_hubs_cache_is_verified_and_opened(
    build_bundle: Build, tmp_path: Path
) -> None:
    import hashlib

    folder = build_bundle()
    repository = tmp_path / "models--a--b"
    snapshot, blobs = repository / "snapshots" / "01", repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in folder.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, blobs / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")

    assert verify_bundle(snapshot).hashed_files == len(list(folder.iterdir())) - 1
    with Session.open(folder) as session, Session.open(snapshot) as cached:
        expected = session.generate("ab", max_new_tokens=4)
        assert cached.generate("ab", max_new_tokens=4).tokens == expected.tokens

    weights = (snapshot / "model.onnx.data").resolve()
    content = bytearray(weights.read_bytes())
    content[5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(IntegrityError, match="altered"):
        Session.open(snapshot)
    (snapshot / "model.onnx.data").unlink()
    (snapshot / "model.onnx.data").symlink_to(folder / "model.onnx.data")
    with pytest.raises(IntegrityError, match="cp -rL"):
        Session.open(snapshot)


class Overflowing:
    """An engine whose activations overflow."""

    max_length, chunk_tokens, length = 8, 8, 0

    def reset(self) -> None:
        """Forget nothing."""

    def run(self, tokens: TokenArray, _: object, rows: LogitRows) -> Any:
        return np.full((len(tokens) if rows == "all" else 1, 5), np.nan, dtype=np.float32)

    def experts_used(self) -> None:
        """Tell nothing."""


def test_an_overflow_of_float16_is_called_one() -> None:
    broken: Any = Overflowing()
    decoder = Decoder(broken, [1], top_k=1, vocab_size=5, half=True)
    with pytest.raises(BackendError, match=r"float16 graph has overflowed.*--precision fp32"):
        decoder.prefill([1, 2])
    with pytest.raises(BackendError, match="float16 graph has overflowed"):
        decoder.token_logprobs([1, 2, 3], 1)
    whole = Decoder(broken, [1], top_k=1, vocab_size=5)
    with pytest.raises(BackendError, match="the graph or the engine is broken"):
        whole.token_logprobs([1, 2, 3], 1)


def test_a_prompt_that_is_too_long_is_told_what_helps() -> None:
    broken: Any = Overflowing()
    short = Decoder(broken, [1], top_k=1, vocab_size=5, longest=100)
    with pytest.raises(RequestError, match="at most 100: `--max-length` of `edgemoe run`"):
        short.check([1] * 9)
    with pytest.raises(RequestError, match="the model takes no more"):
        Decoder(broken, [1], top_k=1, vocab_size=5, longest=8).check([1] * 9)
