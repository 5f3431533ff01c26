"""The reference of a configuration, made from its dataclasses, so that it cannot be out of date.

A field's text is its `#:` comment, on its lines, else directly above, else directly below; or its entry under
"Attributes:" in the docstring. A section's text is the first paragraph of its class's docstring.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import io
import json
import re
import textwrap
import tokenize
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cord.config.loading import describe_type, is_plain, sections_in

REQUIRED = "required"


@dataclasses.dataclass(frozen=True)
class Key:
    """One key: its dotted name, type, default and meaning, and the class that declares it."""

    name: str
    type: str
    default: str
    meaning: str  #: Markdown; empty where the code has no text
    declared: str  #: module and class, as Python names them


@dataclasses.dataclass(frozen=True)
class Section:
    """The keys directly in one section; the top level's name is empty."""

    name: str
    purpose: str
    keys: list[Key]
    declared: str


def sections(cls: type, name: str = "") -> Iterator[Section]:
    """Yield a configuration's sections, each before those within it."""
    hints, texts = typing.get_type_hints(cls), comments(cls)
    keys, inner = [], list[tuple[type, str]]()
    for field in dataclasses.fields(cls):
        path, hint = f"{name}.{field.name}".lstrip("."), hints[field.name]
        inner += sections_in(hint, path)  # the names in a map of sections are the user's
        if is_plain(hint):
            declared = next(
                base for base in reversed(cls.__mro__) if field.name in vars(base).get("__annotations__", {})
            )
            text = texts.get(field.name, "")
            keys.append(Key(path, describe_type(hint), _default(field), text, _place(declared)))
    purpose = (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")
    yield Section(name, purpose, keys, _place(cls))
    for nested, path in inner:
        yield from sections(nested, path)


def comments(cls: type) -> dict[str, str]:
    """Return the texts of a dataclass's fields, inherited ones included."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__dataclass_fields__" in vars(base):
            own = _own_comments(textwrap.dedent(inspect.getsource(base)))
            found |= {name: text for name, text in _attributes(inspect.getdoc(base) or "").items() if not own.get(name)}
            found |= {name: text for name, text in own.items() if text or name not in found}
    return found


def markdown(listed: list[Section]) -> str:
    """Return sections as Markdown, a table each."""
    lines = []
    for section in listed:
        if section.keys:
            title = f"## `{section.name}`" if section.name else "## Top level"
            lines += [title, "", section.purpose, "", "| key | type | default | |", "|---|---|---|---|"]
            for key in section.keys:
                default = f"**{REQUIRED}**" if key.default == REQUIRED else f"`{key.default}`"
                lines.append(f"| `{key.name}` | {_cell(key.type)} | {default} | {_cell(key.meaning)} |")
            lines.append("")
    return "\n".join(lines)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _attributes(doc: str) -> dict[str, str]:
    section = re.search(r"^Attributes:\n((?:    .*\n?)+)", doc, re.MULTILINE)
    entries = re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", section[1], re.MULTILINE) if section else []
    return {name: " ".join(text.split()) for name, text in entries}


def _own_comments(source: str) -> dict[str, str]:
    beside: dict[int, str] = {}  # line → text, of comments that follow code
    alone: dict[int, str] = {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.string.startswith("#:"):
            (alone if token.line.lstrip().startswith("#:") else beside)[token.start[0]] = token.string[2:].strip()
    (body,) = ast.parse(source).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno is not None:
            lines = [beside[line] for line in range(node.lineno, node.end_lineno + 1) if line in beside]
            for start, step in ((node.lineno - 1, -1), (node.end_lineno + 1, 1)):
                lines = lines or [alone.pop(line) for line in _block(alone, start, step)]
            found[node.target.id] = " ".join(lines)
    return found


def _block(alone: dict[int, str], start: int, step: int) -> list[int]:
    """Return the numbers of adjoining comment lines from `start` on, ascending."""
    lines = []
    while start in alone:
        lines.append(start)
        start += step
    return sorted(lines)


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return REQUIRED
    return str(value) if isinstance(value, (str, Path)) and value else json.dumps(value, default=str)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
