"""The reference of the public Python API, read from sources: nothing of them is imported.

A public name is one of a package's `__all__`. Where it is defined is what the package's
`if TYPE_CHECKING:` block says, as lazy packages have one for type checkers. griffe reads the
signature and the docstring (Google style) of each; Sphinx gets a page per package, which
conf.py has written before every build.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING

import griffe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Package and the folder that it lies in.
PACKAGES = {"edgemoe": ".", "edgemoe_exporters": "exporters", "edgemoe_runtime": "runtime"}
_SECTIONS = {"returns": "Returns", "yields": "Yields"}


def write_pages(root: Path, folder: Path) -> list[str]:
    """Write a page per package that has an `__all__`.

    Args:
        root: Top of the repository.
        folder: Where to write; made if it is absent.

    Returns:
        Names of the packages that have a page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for package, place in PACKAGES.items():
        text = render(package, root / place)
        if text:
            target = folder / f"{package}.rst"
            # An unchanged page keeps its time, so that Sphinx need not read it again.
            if not target.exists() or target.read_text(encoding="utf-8") != text:
                target.write_text(text, encoding="utf-8")
            written.append(package)
    return written


def render(package: str, place: Path) -> str:
    """Return the page of one package, empty where it has no `__all__`."""
    names = public_names(place / package / "__init__.py", package)
    found = {name: _find(name, module, place) for name, module in names.items()}
    # Functions first, then classes, errors last; in the order of the alphabet each.
    order = sorted(
        found, key=lambda name: (found[name].is_class, name.endswith("Error"), name.lower())
    )
    blocks = [
        block for name in order for block in _describe(found[name], f"{package}.{name}", 0)
    ]
    if not blocks:
        return ""
    title = f"``{package}``"
    return "\n".join([f".. _{package}:", "", title, "-" * len(title), "", *blocks, ""])


def public_names(init: Path, package: str) -> dict[str, str]:
    """Return the module of each public name.

    Args:
        init: The package's `__init__.py`.
        package: Its name.

    Returns:
        Modules by name, in the order of `__all__`; a name that is bound in the package itself
        has the package.

    Raises:
        LookupError: A name of `__all__` is neither imported nor bound.
    """
    tree = ast.parse(init.read_text(encoding="utf-8"))
    modules: dict[str, str] = {}
    listed: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            modules |= {alias.asname or alias.name: node.module for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            modules[node.name] = package
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                if isinstance(target, ast.Name):
                    modules[target.id] = package
                    if target.id == "__all__" and isinstance(node.value, (ast.List, ast.Tuple)):
                        listed = [ast.literal_eval(item) for item in node.value.elts]
    lost = [name for name in listed if name not in modules]
    if lost:
        raise LookupError(f"{init} must import {', '.join(lost)} for type checkers.")
    return {name: modules[name] for name in listed if not name.startswith("__")}


def _find(name: str, module: str, place: Path) -> griffe.Object:
    base = place.joinpath(*module.split("."))
    file = base.with_suffix(".py") if base.with_suffix(".py").exists() else base / "__init__.py"
    if not file.exists():
        # One package names another's module: its folder is beside.
        other = PACKAGES[module.split(".", maxsplit=1)[0]]
        root = place if (place / "pyproject.toml").exists() else place.parent
        return _find(name, module, root / other)
    tree = griffe.visit(
        module, file, file.read_text(encoding="utf-8"), docstring_parser="google"
    )
    found = tree[name]
    if isinstance(found, griffe.Alias):
        # Handed on by this module, too.
        source, _, own = found.target_path.rpartition(".")
        return _find(own, source, place)
    return found


def _describe(found: griffe.Object, name: str, depth: int) -> Iterator[str]:
    pad = "   " * depth
    if isinstance(found, griffe.Class):
        bases = [str(base) for base in found.bases]
        yield f"{pad}.. py:class:: {name}{f'({_fields(found)})' if _fields(found) else ''}"
        yield ""
        if bases:
            yield f"{pad}   Bases: {', '.join(f'``{base}``' for base in bases)}"
            yield ""
        yield from _document(found, depth + 1)
        for member in found.members.values():
            if isinstance(member, griffe.Alias) or member.name.startswith("_"):
                continue
            if isinstance(member, griffe.Function) or "property" in member.labels:
                yield from _describe(member, member.name, depth + 1)
    elif isinstance(found, griffe.Function):
        kind = "function" if depth == 0 else "method"
        if "classmethod" in found.labels:
            kind = "classmethod"
        returns = f" -> {found.returns}" if found.returns is not None else ""
        yield f"{pad}.. py:{kind}:: {name}({_parameters(found)}){returns}"
        yield ""
        yield from _document(found, depth + 1)
    else:
        kind = "property" if "property" in found.labels else "data"
        annotation = getattr(found, "annotation", None)
        yield f"{pad}.. py:{kind}:: {name}"
        if annotation is not None:
            yield f"{pad}   :type: {annotation}"
        yield ""
        yield from _document(found, depth + 1)


def _fields(found: griffe.Class) -> str:
    """Return a dataclass's fields as they are given to it, of other classes nothing."""
    if not any(str(decorator.value).startswith("dataclass") for decorator in found.decorators):
        return ""
    given = [
        f"{member.name}: {member.annotation}"
        + (f" = {_default(str(member.value))}" if member.value is not None else "")
        for member in found.members.values()
        if isinstance(member, griffe.Attribute) and "property" not in member.labels
        and member.is_public and member.annotation is not None
    ]  # fmt: skip
    return ", ".join(given)


def _default(value: str) -> str:
    """Return what a reader sees of a field's default: of a factory, what it makes."""
    found = re.fullmatch(r"field\(.*default_factory=(\w+).*\)", value)
    return f"{found[1]}()" if found else value


def _parameters(found: griffe.Function) -> str:
    shown: list[str] = []
    starred = False
    for parameter in found.parameters:
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is griffe.ParameterKind.keyword_only and not starred:
            starred = True
            shown.append("*")
        star = {
            griffe.ParameterKind.var_positional: "*",
            griffe.ParameterKind.var_keyword: "**",
        }.get(parameter.kind, "")
        starred = starred or star == "*"
        text = f"{star}{parameter.name}"
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not star:
            text += f" = {parameter.default}"
        shown.append(text)
    return ", ".join(shown)


def _document(found: griffe.Object, depth: int) -> Iterator[str]:
    pad = "   " * depth
    if found.docstring is None:
        return
    for section in found.docstring.parse("google", warnings=False):
        kind = section.kind.value
        if kind == "text":
            yield from (f"{pad}{line}".rstrip() for line in section.value.splitlines())
        elif kind in ("parameters", "raises"):
            for item in section.value:
                role = "param" if kind == "parameters" else "raises"
                label = item.name if kind == "parameters" else item.annotation
                yield f"{pad}:{role} {label}: {_joined(item.description)}"
        elif kind == "attributes":
            yield from (
                f"{pad}* **{it.name}**: {_joined(it.description)}" for it in section.value
            )
        elif kind == "admonition" and section.value.description.startswith(">>>"):
            yield from (
                f"{pad}.. rubric:: {section.title}",
                "",
                f"{pad}.. code-block:: pycon",
                "",
            )
            lines = section.value.description.splitlines()
            yield from (f"{pad}   {line}".rstrip() for line in lines)
        elif kind in _SECTIONS:
            text = " ".join(_joined(item.description) for item in section.value)
            yield f"{pad}:{kind}: {text}"
        else:
            raise LookupError(f"{found.path}: a docstring's section {kind} has no form here.")
        yield ""


def _joined(text: str) -> str:
    return " ".join(text.split())
