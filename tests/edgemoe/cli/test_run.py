"""`edgemoe run` and `edgemoe bench`: where the prompt comes from, and how long it may be."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from click.testing import CliRunner

from edgemoe.cli import main
from edgemoe.cli.context_length import bytes_per_token, choose_length
from edgemoe_runtime.bundle.file_entry import FileEntry
from edgemoe_runtime.bundle.manifest_file import load_manifest, save_manifest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from click.testing import Result

ASKED = ("--task=prose", "--max-new-tokens=5")


def test_the_prompt_comes_from_the_command_line_a_file_or_standard_input(
    bundle: Path, answer: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "prompt.txt").write_text("The belt\n")
    direct = answer("run", bundle, *ASKED, "--prompt", "The belt")
    read = answer("run", bundle, *ASKED, "--prompt-file", tmp_path / "prompt.txt")
    piped = CliRunner().invoke(
        main, ["run", str(bundle), *ASKED, "--prompt", "-", "--json"], input="The belt\n"
    )

    assert read["tokens"] == direct["tokens"] == json.loads(piped.stdout)["tokens"]
    assert read["prompt_tokens"] == direct["prompt_tokens"]


def test_a_prompt_is_given_once_and_is_text(
    bundle: Path, invoke: Callable[..., Result], tmp_path: Path
) -> None:
    for given in ((), ("--prompt", "a", "--prompt-file", tmp_path / "x")):
        result = invoke("run", bundle, *ASKED, *given)
        assert result.exit_code == 2
        assert "exactly one of --prompt" in " ".join(result.stderr.split())
    missing = invoke("run", bundle, *ASKED, "--prompt-file", tmp_path / "x")
    assert "No such file" in missing.stderr
    (tmp_path / "latin").write_bytes(b"Ma\xdf")
    latin = invoke("run", bundle, *ASKED, "--prompt-file", tmp_path / "latin")
    assert "must be UTF-8, got the byte 0xdf" in latin.stderr
    system = invoke("run", bundle, *ASKED, "--prompt", "a", "--system", "b")
    assert "--system is a message of a chat" in system.stderr


def test_a_chat_is_written_by_the_bundles_template(
    copied_bundle: Path, answer: Callable[..., dict[str, Any]], invoke: Callable[..., Result]
) -> None:
    none = invoke("run", copied_bundle, *ASKED, "--chat", "--prompt", "hi")
    assert "A chat needs a template, got none" in none.stderr
    content = b"{% for m in messages %}{{ m.role }}: {{ m.content }};{% endfor %}"
    (copied_bundle / "chat_template.jinja").write_bytes(content)
    manifest = load_manifest(copied_bundle)
    entry = FileEntry(sha256=hashlib.sha256(content).hexdigest(), size=len(content))
    size = replace(manifest.size, total_bytes=manifest.size.total_bytes + len(content))
    files = {**manifest.files, "chat_template.jinja": entry}
    save_manifest(replace(manifest, files=files, size=size), copied_bundle)

    chat = answer(
        "run", copied_bundle, *ASKED, "--chat", "--system", "be short", "--prompt", "x"
    )
    whole = answer("run", copied_bundle, *ASKED, "--prompt", "system: be short;user: x;")
    assert chat["tokens"] == whole["tokens"]
    assert chat["prompt_tokens"] == whole["prompt_tokens"]


def test_lengths_are_options_and_refusals_name_them(
    bundle: Path, answer: Callable[..., dict[str, Any]], invoke: Callable[..., Result]
) -> None:
    prompt = "The belt slips. " * 4
    short = invoke("run", bundle, *ASKED, "--prompt", prompt, "--max-length", 8)
    assert "at most 256: `--max-length` of `edgemoe run`" in short.stderr
    assert answer("run", bundle, *ASKED, "--prompt", prompt, "--max-length", 128)["new_tokens"]
    long = invoke("run", bundle, *ASKED, "--prompt", prompt * 40)
    assert "the model takes no more" in long.stderr
    bench = ("bench", bundle, "--task=code", "--repeat=1")
    beyond = invoke(*bench, "--prompt-tokens", 300)
    assert "the model takes 256 tokens, got 300 + 64. Give smaller numbers." in beyond.stderr
    within = invoke(*bench, "--prompt-tokens", 40, "--new-tokens", 2, "--max-length", 20)
    assert "--max-length is 20" in within.stderr


def test_a_session_is_as_long_as_the_prompt_needs_and_memory_holds(
    copied_bundle: Path, tmp_path: Path
) -> None:
    manifest = load_manifest(copied_bundle)
    # two layers of two heads, keys and values of 16 numbers each, in float32
    assert bytes_per_token(manifest) == 2 * 2 * 32 * 4
    model = replace(manifest.model, max_position_embeddings=100_000)
    save_manifest(replace(manifest, model=model), copied_bundle)

    def choose(needed: int, free_kib: int) -> int | None:
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable:   {free_kib} kB\n")
        return choose_length(copied_bundle, needed, tmp_path)

    assert choose(4096, 1 << 30) is None
    assert choose(5000, 1 << 30) == 5000
    assert choose(200_000, 1 << 30) == 100_000
    # half a KiB a token, and half of the memory is for other things
    assert choose(200_000, 6000) == 6000
    assert choose(200_000, 1) is None
