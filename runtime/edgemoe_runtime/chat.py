"""Chats to prompts, by the template that a checkpoint or a bundle carries.

A template is a program in Jinja's language that comes with the weights, from whoever published
them. It runs in Jinja's sandbox, sees plain values only, and is given what transformers 5.24
gives it: the messages, the tools, the named special tokens, `raise_exception`, `strftime_now`,
a `tojson` that escapes no HTML, and blocks that mark what the assistant says. The package
jinja2 is imported when a template is opened.
"""

from __future__ import annotations

import datetime as dt
import importlib
import json
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from edgemoe_runtime.errors import BundleError, RequestError
from edgemoe_runtime.input_files import parse_strict, read_file
from edgemoe_runtime.messages import quote

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    Message: TypeAlias = Mapping[str, Any]
    Read: TypeAlias = Callable[[str], bytes | None]

TEMPLATE_FILE = "chat_template.jinja"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL_TOKENS_MAP = "special_tokens_map.json"
_NAMED_TOKENS = (
    "bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token",
)  # fmt: skip
# What a message's reasoning is called: the first is what templates read, gpt-oss's the second.
_REASONING = ("reasoning_content", "thinking", "reasoning")
_OLDEST = (3, 1, 6)  # of jinja2: older ones have known ways out of the sandbox
_MAX_TEMPLATE_BYTES = 16 << 20


class ChatTemplate:
    """A chat template, ready to render."""

    def __init__(self, source: str, tokens: Mapping[str, str] | None = None) -> None:
        """Compile a template.

        Args:
            source: the template.
            tokens: named special tokens, such as `{"eos_token": "</s>"}`.

        Raises:
            RequestError: when jinja2 is missing or too old.
            BundleError: when the template is malformed.
        """
        self._tokens = dict(tokens or {})
        environment, errors = _environment()
        self._errors = errors
        try:
            self._template = environment.from_string(source)
        except errors as error:
            raise BundleError(
                f"a chat template must be Jinja, got: {quote(str(error))}."
            ) from error

    @classmethod
    def load(cls, folder: Path, read: Read | None = None) -> ChatTemplate | None:
        """Open the template of a checkpoint or a bundle.

        Args:
            folder: its directory.
            read: returns a file of it by name, where that is no directory; None where it has
                no such file.

        Returns:
            The template of chat_template.jinja, else that of tokenizer_config.json; None where
            neither has one.

        Raises:
            RequestError: when jinja2 is missing or too old.
            BundleError: when a file is malformed.
        """
        read = read or _reader(folder)
        content = read(TEMPLATE_FILE)
        if content is not None:
            try:
                source: str | None = content.decode("utf-8")
            except UnicodeDecodeError as error:
                raise BundleError(
                    f"{folder / TEMPLATE_FILE} must be UTF-8, got: {error}."
                ) from error
        else:
            settings = _read_settings(read, folder / _TOKENIZER_CONFIG)
            source = _default_template(settings.get("chat_template"))
        if source is None:
            return None
        return cls(source, read_named_tokens(folder, read))

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Write a chat as the prompt that the model was trained on.

        Args:
            messages: mappings with `role` and `content`, in order.
            tools: JSON schemas of functions that the model may call.
            add_generation_prompt: whether the prompt ends where the assistant begins.
            variables: what else the template reads, such as `enable_thinking`.

        Returns:
            The prompt.

        Raises:
            RequestError: when a message has no role, or the template refuses the messages.
        """
        plain = [
            _prepare(message, place) for place, message in enumerate(check_messages(messages))
        ]
        given = {**self._tokens, **(variables or {})}
        try:
            text: str = self._template.render(
                messages=plain,
                tools=None if tools is None else _plain(list(tools)),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **{name: _plain(value) for name, value in given.items()},
            )
        except self._errors as error:
            raise RequestError(
                f"The chat template must accept the messages, but it refused them:"
                f" {quote(str(error))}. Change the roles or the order of the messages."
            ) from error
        except RecursionError as error:
            raise RequestError("A chat template must not recurse without end.") from error
        except Exception as error:  # a template may do anything with a value of another type
            raise RequestError(
                f"The chat template must be able to read the messages, got"
                f" {type(error).__name__}: {quote(str(error))}. Give each message a role and a"
                " content as the model's own examples do."
            ) from error
        return text


def check_messages(messages: object) -> list[Mapping[str, Any]]:
    """Refuse what is no chat.

    Args:
        messages: what a caller gave.

    Returns:
        The messages.

    Raises:
        RequestError: when they are no list of mappings with a `role`, or there are none.
    """
    given: list[object] = []
    shown = quote(messages, 80)
    if isinstance(messages, (list, tuple)):
        given = list(cast("Sequence[object]", messages))
    if not given:
        raise RequestError(
            f"messages must be a list of {{role, content}}, one or more, got {shown}."
        )
    found: list[Mapping[str, Any]] = []
    for place, message in enumerate(given):
        shown = quote(message, 80)
        mapping = cast("dict[str, Any]", message) if isinstance(message, dict) else {}
        role = mapping.get("role")
        if not isinstance(role, str) or not role:
            raise RequestError(
                f"messages[{place}] must be a mapping with a role, such as"
                f' {{"role": "user", "content": "..."}}, got {shown}.'
            )
        found.append(mapping)
    return found


def read_named_tokens(folder: Path, read: Read | None = None) -> dict[str, str]:
    """Read the special tokens that have names, as templates and end tokens need them.

    Args:
        folder: directory of a checkpoint or a bundle.
        read: as in `ChatTemplate.load`.

    Returns:
        Texts by name, such as `{"eos_token": "</s>"}`; tokenizer_config.json comes first.

    Raises:
        BundleError: when a file is malformed.
    """
    found: dict[str, str] = {}
    for name in (_TOKENIZER_CONFIG, _SPECIAL_TOKENS_MAP):
        settings = _read_settings(read or _reader(folder), folder / name)
        for token in _NAMED_TOKENS:
            text = settings.get(token)
            if isinstance(text, dict):
                text = cast("dict[str, Any]", text).get("content")
            if isinstance(text, str) and token not in found:
                found[token] = text
    return found


def _reader(folder: Path) -> Read:
    def read(name: str) -> bytes | None:
        try:
            return read_file(folder / name, _MAX_TEMPLATE_BYTES)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BundleError(f"{folder / name} must be readable, got: {error}.") from error

    return read


def _read_settings(read: Read, file: Path) -> dict[str, Any]:
    content = read(file.name)
    try:
        found: Any = None if content is None else parse_strict(content, infinities=True)
    except ValueError as error:
        raise BundleError(f"{file} must be JSON, got: {error}. Copy it again.") from error
    return cast("dict[str, Any]", found) if isinstance(found, dict) else {}


def _default_template(value: object) -> str | None:
    """Return the template of tokenizer_config.json: a text, or one of several by name."""
    if isinstance(value, list):
        named: dict[Any, Any] = {}
        for one in cast("list[object]", value):
            if isinstance(one, dict):
                entry = cast("dict[str, Any]", one)
                named[entry.get("name")] = entry.get("template")
        value = named.get("default")
    return value if isinstance(value, str) else None


def _prepare(message: Mapping[str, Any], place: int) -> dict[str, Any]:
    """Return a message as templates expect it: without what is None, its reasoning by name."""
    plain = {name: _plain(value) for name, value in message.items() if value is not None}
    names: list[object] = list(plain)
    if not all(isinstance(name, str) for name in names):
        raise RequestError(
            f"messages[{place}] must have texts as keys, got {quote(message, 80)}."
        )
    reasoning = next((plain[name] for name in _REASONING if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _plain(value: Any) -> Any:
    """Rebuild a value of plain types: objects have methods that no sandbox knows."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, dict):
        mapping: dict[Any, Any] = value  # pyright: ignore[reportUnknownVariableType]
        return {_plain(name): _plain(item) for name, item in mapping.items()}
    if isinstance(value, list):
        listed: list[Any] = value  # pyright: ignore[reportUnknownVariableType]
        return [_plain(item) for item in listed]
    if isinstance(value, tuple):
        several: tuple[Any, ...] = value  # pyright: ignore[reportUnknownVariableType]
        return tuple(_plain(item) for item in several)
    return f"<{type(value).__name__}>"


def _environment() -> tuple[Any, type[Exception]]:
    """Return Jinja's sandbox with what templates call, and the class of its errors."""
    try:
        jinja2: Any = importlib.import_module("jinja2")
        extension: Any = importlib.import_module("jinja2.ext")
        sandbox: Any = importlib.import_module("jinja2.sandbox")
    except ImportError as error:
        raise RequestError(
            "A chat needs the package jinja2, which is not installed. Run:"
            " pip install 'edgemoe[chat]'"
        ) from error
    release = importlib.import_module("importlib.metadata").version("jinja2")
    if tuple(int(part) for part in release.split(".")[:3] if part.isdigit()) < _OLDEST:
        raise RequestError(
            f"A chat needs jinja2 {'.'.join(map(str, _OLDEST))} or newer, got {release}: older"
            " ones have holes in the sandbox. Run: pip install -U 'edgemoe[chat]'"
        )

    class Spoken(extension.Extension):  # type: ignore[misc]  # jinja2 is untyped here
        """`{% generation %}`: marks what the assistant says; rendering passes it through."""

        tags = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.Scope(body).set_lineno(line)

    class Namespace(jinja2.utils.Namespace):  # type: ignore[misc]  # as above
        """Jinja's, without names that lead into Python."""

        def __setitem__(self, name: str, value: Any) -> None:
            if str(name).startswith("_"):
                raise jinja2.exceptions.SecurityError(f"a namespace has no {name!r}")
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def refuse(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Spoken, extension.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=refuse, strftime_now=_strftime_now, namespace=Namespace, dict=_Dict()
    )
    return environment, jinja2.exceptions.TemplateError


class _Dict:
    """`dict` as templates call it: the type itself would lead into Python."""

    def __call__(self, *given: Any, **named: Any) -> dict[Any, Any]:
        return dict(*given, **named)

    def fromkeys(self, *given: Any) -> dict[Any, Any]:
        """Return `dict.fromkeys`."""
        return dict.fromkeys(*given)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,  # templates call it so
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # as above
) -> str:
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _strftime_now(pattern: str) -> str:
    return dt.datetime.now().strftime(pattern)  # the local date, as said
