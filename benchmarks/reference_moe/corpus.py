"""The text that the reference MoE is carved, distilled and judged on.

Debian packages carry it; on a Debian machine::

    apt-get install bible-kjv anarchism dict-gcide dict-foldoc dict-jargon dict-devil \
        wordnet-base manpages manpages-dev manpages-{fr,es,it,nl,pl,pt-br,de} fail2ban \
        fortunes fortunes-min

Each domain is a list of documents, split by document: every tenth is a test document, and
no test document is ever trained on. `fortunes` and `man-de` are held out whole: nothing
of either domain is seen while carving or distilling.

Run as a script, it writes domains as task files, of many short lines so that intervals over
lines mean something::

    python -m benchmarks.reference_moe.corpus demo/domains bible code man-fr wordnet
    python -m benchmarks.pruning demo/moe --tasks demo/domains
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import html
import itertools
import json
import re
import subprocess
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HELD_OUT = ("fortunes", "man-de")
LINE_CHARACTERS = 400  # about a hundred tokens
FILE_LINES = 400


def _by_hash(paths: list[Path]) -> list[Path]:
    """Order files by the hash of their names: a shuffle that every machine repeats."""
    return sorted(paths, key=lambda path: hashlib.sha256(path.name.encode()).digest())


def _man_pages(language: str, limit: int = 600) -> Iterator[str]:
    root = Path("/usr/share/man") / language
    sections = [root / f"man{n}" for n in (1, 2, 3, 5, 7, 8)]
    pages = _by_hash([path for section in sections for path in section.glob("*.gz")])
    for page in pages[:limit]:
        source = gzip.decompress(page.read_bytes()).decode("utf-8", "ignore")
        if len(source) > 1500:
            yield _strip_roff(source)


def _strip_roff(source: str) -> str:
    lines = []
    for line in source.splitlines():
        if line.startswith(('.\\"', "'\\\"", "\\.")):
            continue
        match = re.match(r"\.(SH|SS|B|I|BR|IR|RB|RI|BI|IB|TP|IP|Nm|Nd|Sh)\s+(.*)", line)
        if match:
            line = match.group(2)
        elif line.startswith((".", "'")):
            continue
        line = re.sub(r"\\f(\[[A-Z]*\]|\([A-Z]{2}|.)", "", line)
        line = re.sub(r"\\s[-+]?\d", "", line)
        line = line.replace("\\-", "-").replace("\\(aq", "'").replace("\\(bu", "*")
        line = line.replace("\\&", "").replace("\\e", "\\").replace('"', "").replace("\\ ", " ")
        line = re.sub(r"\\\[?\(?[a-zA-Z]{2}\]?", "", line)
        lines.append(line)
    return "\n".join(lines)


def _bible() -> Iterator[str]:
    books = (
        "Gen Exo Lev Num Deu Josh Judg Ruth 1Sam 2Sam 1King 2King 1Chr 2Chr Ezra Neh Esth Job "
        "Psa Prov Eccl Isa Jer Lam Ezek Dan Hos Amos Mic Zech Matt Mark Luke John Acts Rom "
        "1Cor 2Cor Gal Eph Phil Heb Jam 1Pet 1John Rev"
    )
    for book in books.split():
        for chapter in range(1, 51, 2):
            reference = f"{book}{chapter}:1-200"
            run = subprocess.run(
                ["bible", reference], capture_output=True, text=True, check=False
            )
            if len(run.stdout) > 800:
                yield re.sub(r"\n(?=[a-zA-Z])", " ", run.stdout.strip())


def _python() -> Iterator[str]:
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [
        path
        for path in root.rglob("*.py")
        if "site-packages" not in path.parts
        and "test" not in path.parts
        and "pydoc_data" not in path.parts
        and "encodings" not in path.parts
    ]
    for path in _by_hash(files):
        source = path.read_text(encoding="utf-8", errors="ignore")
        if len(source) > 1500:
            yield source[:20_000]


def _topics() -> Iterator[str]:
    import pydoc_data.topics

    yield from (text for _, text in sorted(pydoc_data.topics.topics.items()) if len(text) > 600)


def _dictd(name: str) -> Callable[[], Iterator[str]]:
    def read() -> Iterator[str]:
        raw = gzip.decompress(Path(f"/usr/share/dictd/{name}.dict.dz").read_bytes())
        text = raw.decode("utf-8", "ignore")
        yield from (text[i : i + 6000] for i in range(20_000, min(len(text), 12_000_000), 6000))

    return read


def _anarchism() -> Iterator[str]:
    root = Path("/usr/share/doc/anarchism/html")
    for page in _by_hash(list(root.glob("*.html"))):
        source = page.read_text(encoding="utf-8", errors="ignore")
        text = html.unescape(
            re.sub(r"<[^>]+>", "", re.sub(r"(?s)<(script|style).*?</\1>", "", source))
        )
        text = re.sub(r"[ \t]+", " ", re.sub(r"\n\s*\n+", "\n\n", text)).strip()
        if len(text) > 2000:
            yield text[:40_000]


def _wordnet() -> Iterator[str]:
    for part in ("noun", "verb", "adj", "adv"):
        glosses = []
        for line in Path(f"/usr/share/wordnet/data.{part}").read_text().splitlines():
            if " | " in line:
                fields, gloss = line.split(" | ", 1)
                glosses.append(f"{fields.split()[4].replace('_', ' ')}: {gloss.strip()}")
        glosses.sort(key=lambda text: hashlib.sha256(text.encode()).digest())
        yield from (
            "\n".join(glosses[i : i + 40]) for i in range(0, min(len(glosses), 12_000), 40)
        )


def _logs() -> Iterator[str]:
    listing = subprocess.run(
        ["dpkg", "-L", "fail2ban"], capture_output=True, text=True, check=True
    )
    for name in sorted(line for line in listing.stdout.splitlines() if "/files/logs/" in line):
        path = Path(name)
        if path.is_file():
            lines = path.read_text(encoding="utf-8", errors="ignore").splitlines()
            text = "\n".join(line for line in lines if line and not line.startswith("#"))
            if len(text) > 400:
                yield text


def _fortunes() -> Iterator[str]:
    names: list[str] = []
    for package in ("fortunes", "fortunes-min"):
        listing = subprocess.run(
            ["dpkg", "-L", package], capture_output=True, text=True, check=True
        )
        names += [line for line in listing.stdout.splitlines() if "/games/fortunes/" in line]
    for name in sorted(names):
        path = Path(name)
        if path.suffix == "" and path.is_file():
            cookies = path.read_text(encoding="utf-8", errors="ignore").split("\n%\n")
            cookies = [cookie.strip() for cookie in cookies if len(cookie.strip()) > 60]
            yield from ("\n\n".join(cookies[i : i + 16]) for i in range(0, len(cookies), 16))


DOMAINS: dict[str, Callable[[], Iterator[str]]] = {
    "bible": _bible,
    "code": _python,
    "manual": _topics,
    "man-en": lambda: _man_pages("."),
    "man-fr": lambda: _man_pages("fr"),
    "man-es": lambda: _man_pages("es"),
    "man-it": lambda: _man_pages("it"),
    "man-nl": lambda: _man_pages("nl"),
    "man-pl": lambda: _man_pages("pl", 200),
    "man-pt": lambda: _man_pages("pt_BR", 200),
    "gcide": _dictd("gcide"),
    "foldoc": _dictd("foldoc"),
    "jargon": _dictd("jargon"),
    "devil": _dictd("devil"),
    "prose": _anarchism,
    "wordnet": _wordnet,
    "logs": _logs,
    "fortunes": _fortunes,
    "man-de": lambda: _man_pages("de"),
}


def documents(domain: str, split: str) -> list[str]:
    """Documents of one split of a domain.

    Args:
        domain: A key of `DOMAINS`.
        split: `"train"` or `"test"`. A held-out domain has no train split.

    Returns:
        The documents in the order of the split.

    Raises:
        ValueError: A held-out domain was asked for its train split.
    """
    if domain in HELD_OUT:
        if split == "train":
            raise ValueError(f"{domain} is held out: it has no train split.")
        return list(DOMAINS[domain]())
    want_test = split == "test"
    return [text for i, text in enumerate(DOMAINS[domain]()) if (i % 10 == 5) == want_test]


def task_lines(domain: str, split: str) -> Iterator[str]:
    """Yield short pieces of a domain's documents, every document in turn.

    Args:
        domain: A key of `DOMAINS`.
        split: `"train"` or `"test"`; of a held-out domain, every other document is train.

    Yields:
        At most `FILE_LINES` texts of whole lines, about `LINE_CHARACTERS` long.
    """
    if domain in HELD_OUT:
        texts = documents(domain, "test")[split == "test" :: 2]
    else:
        texts = documents(domain, split)
    sources = [_pieces(text) for text in texts]
    turns = itertools.zip_longest(*sources)
    found = (piece for turn in turns for piece in turn if piece is not None)
    yield from itertools.islice(found, FILE_LINES)


def _pieces(text: str) -> Iterator[str]:
    piece = ""
    for line in text.splitlines():
        if len(piece) + len(line) > LINE_CHARACTERS and len(piece) > LINE_CHARACTERS // 2:
            yield piece[: 2 * LINE_CHARACTERS]
            piece = ""
        piece = f"{piece}\n{line}" if piece else line


def main() -> None:
    """Write NAME.train.jsonl and NAME.test.jsonl for the domains asked for."""
    parser = argparse.ArgumentParser(description="Write domains as task files.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("domains", nargs="+", choices=sorted(DOMAINS), metavar="DOMAIN")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for domain in arguments.domains:
        for split in ("train", "test"):
            lines = [json.dumps({"text": text}) + "\n" for text in task_lines(domain, split)]
            (arguments.folder / f"{domain}.{split}.jsonl").write_text("".join(lines))


if __name__ == "__main__":
    main()
