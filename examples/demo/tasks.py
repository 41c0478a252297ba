"""The demo's task files: Python source, Python's manual, and the King James Bible.

Train and test come from different modules, topics and books. The code and the manual are
those of the Python that runs this, so their lines differ between Python versions and are the
same on every machine with one version; the Bible is in `examples/tasks`.
"""

from __future__ import annotations

import json
import pydoc_data.topics
import shutil
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from edgemoe.staging import staged_file

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

EXCERPTS = Path(__file__).resolve().parent.parent / "tasks"
TASKS = ("code", "manual", "bible")
LINE_CHARACTERS = 1500  # about one window of 512 tokens
FILE_CHARACTERS = 150_000

# The reference MoE was distilled on other modules and topics than the tested ones.
TRAIN_MODULES = (
    "csv", "dataclasses", "difflib", "functools", "heapq", "inspect", "random", "socket",
    "statistics", "subprocess", "tempfile", "textwrap", "threading", "traceback", "uuid",
)  # fmt: skip
TEST_MODULES = (
    "_strptime", "argparse", "code", "enum", "ipaddress", "py_compile", "shelve", "shutil",
    "webbrowser",
)  # fmt: skip
TEST_TOPICS = ("attribute-access", "exprlists", "integers", "slicings", "typesmethods")


def make_tasks(folder: Path) -> None:
    """Write `<task>.train.jsonl` and `<task>.test.jsonl` for every task.

    Args:
        folder: Where to write; files that exist are kept.
    """
    for split in ("train", "test"):
        modules = TRAIN_MODULES if split == "train" else TEST_MODULES
        _write(folder / f"code.{split}.jsonl", _code(modules))
        _write(folder / f"manual.{split}.jsonl", _manual(split))
        target = folder / f"bible.{split}.jsonl"
        if not target.exists():
            with staged_file(target) as staged:
                shutil.copyfile(EXCERPTS / target.name, staged)


def _write(target: Path, lines: Iterable[str]) -> None:
    if target.exists():
        return
    with staged_file(target) as staged, staged.open("w", encoding="utf-8") as file:
        for line in lines:
            file.write(json.dumps({"text": line}, ensure_ascii=False) + "\n")


def _code(modules: Iterable[str]) -> Iterator[str]:
    """Yield pieces of the modules' source, every module in turn, so that none dominates."""
    library = Path(sysconfig.get_path("stdlib"))
    sources = [(library / f"{name}.py").read_text(encoding="utf-8") for name in modules]
    return _take_turns([_pieces(source, "\n") for source in sources])


def _manual(split: str) -> Iterator[str]:
    topics = pydoc_data.topics.topics
    tested = {name: topics[name] for name in TEST_TOPICS}
    if split == "test":
        return _take_turns([_pieces(text, "\n\n") for text in tested.values()])
    # A topic may quote another one: whatever is tested is not trained on.
    seen = {paragraph for text in tested.values() for paragraph in text.split("\n\n")}
    kept = (
        "\n\n".join(part for part in text.split("\n\n") if part not in seen)
        for name, text in sorted(topics.items())
        if name not in tested
    )
    return _take_turns([_pieces(text, "\n\n") for text in kept])


def _pieces(text: str, separator: str) -> list[str]:
    """Cut a text at separators into pieces of about `LINE_CHARACTERS`; drop short ones."""
    pieces = []
    piece = ""
    for part in text.split(separator):
        if len(piece) + len(part) > LINE_CHARACTERS:
            pieces.append(piece)
            piece = ""
        piece = f"{piece}{separator}{part}" if piece else part
    return [piece for piece in (*pieces, piece) if len(piece) > LINE_CHARACTERS // 3]


def _take_turns(sources: list[list[str]]) -> Iterator[str]:
    written = 0
    for turn in range(max(map(len, sources))):
        for pieces in sources:
            if turn < len(pieces) and written < FILE_CHARACTERS:
                written += len(pieces[turn])
                yield pieces[turn]
