"""Ways to damage a file: its bytes, or one value of the JSON that it is or holds.

All are drawn from a seeded generator, so a case is named by format, mutation and seed. Values
are those that break programs: wrong types, signs and sizes, NaN, long strings, deep nesting.
None aims at a parser's memory safety: what is written here may be kept as a test.
"""

from __future__ import annotations

import json
import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

# Instead of a value of a JSON document.
_VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 0.5, -0.0, 1e308, "", "x", "a/b",
    "../up", "\n\x1b[31mred", "\u2028", "7", [], [0], [None], {}, {"a": 1}, "y" * 5000,
)  # fmt: skip
_NOT_JSON = ("NaN", "Infinity", "-Infinity", "1e999", "[" * 2000 + "]" * 2000, "'x'", "")


def mutate_bytes(content: bytes, draw: random.Random) -> bytes:
    """Damage bytes as disks, transfers and editors do.

    Args:
        content: What the file holds.
        draw: Where the choice comes from.

    Returns:
        Other bytes; possibly none.
    """
    kind = draw.choice(("cut", "flip", "zero", "insert", "repeat", "drop", "swap", "append"))
    if not content or kind == "append":
        return content + draw.randbytes(draw.randint(1, 64))
    # Most formats have what decides at their beginning.
    most = len(content) if draw.random() < 0.5 else min(len(content), 4096)
    start = draw.randrange(most)
    length = draw.randint(1, min(256, len(content) - start))
    before, middle, after = (
        content[:start],
        content[start : start + length],
        content[start + length :],
    )
    if kind == "cut":
        return before
    if kind == "flip":
        return before + bytes([middle[0] ^ (1 << draw.randrange(8))]) + middle[1:] + after
    if kind == "zero":
        return before + bytes(length) + after
    if kind == "insert":
        return before + draw.randbytes(length) + middle + after
    if kind == "repeat":
        return before + middle + middle + after
    if kind == "drop":
        return before + after
    return after + middle + before


def mutate_json(content: bytes, draw: random.Random) -> bytes:
    """Change one value, name or bracket of a JSON document.

    Args:
        content: A JSON document, UTF-8.
        draw: Where the choice comes from.

    Returns:
        The changed document, which may not be JSON any more.
    """
    document = json.loads(content)
    places = list(_places(document))
    if not places:
        return b"null"
    holder, key = draw.choice(places)
    kind = draw.choice(("value", "value", "value", "remove", "rename", "twice", "text"))
    if kind == "remove":
        del holder[key]
    elif kind == "rename" and isinstance(holder, dict):
        holder[f"{key}_"] = holder.pop(key)
    elif kind == "twice" and isinstance(holder, dict):
        return _with_text(document, holder, key, json.dumps(holder[key]), twice=True)
    elif kind == "text":
        return _with_text(document, holder, key, draw.choice(_NOT_JSON))
    else:
        holder[key] = draw.choice(_VALUES)
    return json.dumps(document).encode()


def in_header(mutate: Callable[[bytes, random.Random], bytes]) -> Callable[..., bytes]:
    """Apply a mutation of JSON to the header of a safetensors file.

    Args:
        mutate: The mutation.

    Returns:
        A mutation of the file; the tensors stay.
    """

    def changed(content: bytes, draw: random.Random) -> bytes:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        inner = header.get("__metadata__", {}).get("edgemoe")
        if inner is not None and draw.random() < 0.8:
            # Any bytes can be a string of JSON, save what is not UTF-8.
            mutated = mutate(inner.encode(), draw).decode("utf-8", "replace")
            header["__metadata__"]["edgemoe"] = mutated
            made = json.dumps(header).encode()
        else:
            made = mutate(content[8 : 8 + length], draw)
        made += b" " * (-len(made) % 8)
        return struct.pack("<Q", len(made)) + made + content[8 + length :]

    return changed


def in_entry(
    name: str, mutate: Callable[[bytes, random.Random], bytes]
) -> Callable[..., bytes]:
    """Apply a mutation of JSON to one entry of a document.

    Args:
        name: The entry.
        mutate: The mutation.

    Returns:
        A mutation of the document.
    """

    def changed(content: bytes, draw: random.Random) -> bytes:
        document = json.loads(content)
        mark = "@@fuzz@@"
        entry, document[name] = document[name], mark
        made = mutate(json.dumps(entry).encode(), draw)
        return json.dumps(document).encode().replace(f'"{mark}"'.encode(), made)

    return changed


def in_line(mutate: Callable[[bytes, random.Random], bytes]) -> Callable[..., bytes]:
    """Apply a mutation of JSON to one line of a JSON Lines file.

    Args:
        mutate: The mutation.

    Returns:
        A mutation of the file.
    """

    def changed(content: bytes, draw: random.Random) -> bytes:
        lines = content.splitlines()
        number = draw.randrange(len(lines))
        lines[number] = mutate(lines[number], draw).replace(b"\n", b" ")
        return b"\n".join(lines) + b"\n"

    return changed


def _places(value: Any) -> Any:
    """Yield each holder and key of a document, depth first."""
    if isinstance(value, dict):
        for key in list(value):
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        # Long lists are alike from one end to the other.
        for index in range(min(len(value), 8)):
            yield value, index
            yield from _places(value[index])


def _with_text(
    document: Any, holder: Any, key: Any, text: str, *, twice: bool = False
) -> bytes:
    mark = "@@fuzz@@"
    kept, holder[key] = holder[key], mark
    written = json.dumps(document)
    holder[key] = kept
    value = f'{text}, "{key}": {text}' if twice else text
    return written.replace(f'"{mark}"', value).encode("utf-8", "surrogatepass")
