"""Turn a YAML file and ``a.b=c`` overrides into dataclasses, and dataclasses back into YAML.

A component declares its configuration as a dataclass beside it; none is imported here. Supported field types: bool,
int, float, str, Path, Literal, Any, unions (with None), list, tuple, dict, and dataclasses of these. A wrong value is
refused in one line that names the dotted field, what was expected, what was given and where. Ranges are checked by a
dataclass's own ``__post_init__``, which raises ValueError (or CordError); the message is prefixed by the section.
``field(metadata={"secret": True})`` keeps a value out of dumps and messages. A root class with a class attribute
``EXPLAINED_BY`` names the command that explains its keys, to which the message about an unknown key points.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from megatron_cord.config.source import FLOAT_PATTERN, Tree, read_tree
from megatron_cord.config.suggestions import renamed, suggest
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import write_atomic

Config = TypeVar("Config")
REDACTED = "***"


def load_config(cls: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Make an instance of the dataclass ``cls`` from a YAML file (None: defaults only) and ``a.b=value`` overrides.

    Later overrides win over earlier ones and over the file.

    Raises:
        CordError: anything is wrong in the file or in an override.
    """
    tree = read_tree(path, overrides)
    return _Reader(cls, tree, "the configuration" if path is None else str(path)).section(cls, tree.values, "")


def from_dict(cls: type[Config], values: dict[str, Any], source: str) -> Config:
    """Make an instance of the dataclass ``cls`` from what ``to_dict`` returned; what lacks has its default.

    Args:
        cls: the dataclass.
        values: by field.
        source: names their place in errors.

    Raises:
        CordError: anything is wrong in them.
    """
    tree = Tree()
    tree.values = values
    return _Reader(cls, tree, source).section(cls, values, "")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a configuration as plain maps, lists and scalars; a secret that is set reads ``***``."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name] = REDACTED if field.metadata.get("secret") and value else _plain(value)
    return plain


def dump_config(config: Any, path: Path | str) -> None:
    """Write ``to_yaml(config)``; the file is complete or absent, never half written.

    Raises:
        CordError: it cannot be written.
    """
    try:
        write_atomic(path, to_yaml(config), sync=True)
    except OSError as error:
        raise CordError(
            f"{path}: cannot write the configuration: {error.strerror}; choose another place or free some space"
        ) from None


def to_yaml(config: Any) -> str:
    """Return ``to_dict(config)`` as YAML that ``load_config`` reads back."""
    text: str = yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
    return text


class _Dumper(getattr(yaml, "CSafeDumper", yaml.SafeDumper)):  # type: ignore[misc]  # with libyaml, where PyYAML has it
    """Quote every text that a YAML 1.1 reader or this one would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_PATTERN, list("-+.0123456789"))


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_dict(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


class _WrongTypeError(Exception):
    """The value at ``path`` does not fit ``hint``."""

    def __init__(self, path: str, hint: Any, value: Any) -> None:
        self.path, self.hint, self.value = path, hint, value


class _Reader:
    """Build the dataclasses of one configuration; ``root`` and ``file`` are for messages."""

    def __init__(self, root: type, tree: Tree, file: str) -> None:
        self.root, self.tree, self.file = root, tree, file

    def section(self, cls: type[Config], given: dict[Any, Any], path: str, defaults: Any = None) -> Config:
        """Make ``cls`` from ``given``, the map at ``path``; what lacks keeps its value in ``defaults``."""
        hints = typing.get_type_hints(cls)
        fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
        for key in given:
            if key not in fields:
                self._unknown(_join(path, key))
        values: dict[str, Any] = {}
        for name, field in fields.items():
            hint, here = hints[name], _join(path, name)
            default = _default(field, hint) if defaults is None else getattr(defaults, name)
            if name in given:
                values[name] = self._field(field, hint, given[name], here, default)
            elif default is not dataclasses.MISSING:
                values[name] = default
            elif dataclasses.is_dataclass(hint):
                values[name] = self.section(typing.cast(type, hint), {}, here)  # names what is required inside it
            else:
                raise CordError(f"{here} is required: set it in {self.file} or as {here}=…")
        try:
            return cls(**values)
        except (ValueError, CordError) as error:
            prefix = f"{path}: " if path else ""
            raise CordError(f"{prefix}{error}{self._where(path)}") from None

    def _field(self, field: dataclasses.Field[Any], hint: Any, value: Any, path: str, default: Any) -> Any:
        try:
            return self._convert(hint, value, path, default)
        except _WrongTypeError as error:
            new = renamed(error.path)
            if new is not None and dataclasses.is_dataclass(error.hint):  # a scalar that became a section
                raise CordError(
                    f"{error.path} is a section now{self._where(error.path)}; the value belongs to '{new}'"
                ) from None
            shown = "another value" if field.metadata.get("secret") else _shorten(error.value)
            raise CordError(
                f"{error.path}: expected {describe_type(error.hint)}, got {shown}{self._where(error.path)}"
            ) from None

    def _convert(self, hint: Any, value: Any, path: str, default: Any = None) -> Any:
        """Return ``value`` as the type ``hint``; raise _WrongTypeError when it does not fit."""
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if hint is Any:
            return value
        if origin is Literal:
            if any(value == choice and type(value) is type(choice) for choice in arguments):
                return value
        elif origin in (Union, types.UnionType):
            return self._convert_union(hint, value, path, default)
        elif dataclasses.is_dataclass(hint):
            cls = typing.cast(type, hint)
            if isinstance(value, dict):
                return self.section(cls, value, path, default if isinstance(default, cls) else None)
        elif (origin or hint) in (list, tuple):
            return self._convert_items(hint, value, path)
        elif (origin or hint) is dict:
            key_hint, item_hint = arguments or (Any, Any)
            if isinstance(value, dict):
                return {
                    self._convert(key_hint, k, path): self._convert(item_hint, item, _join(path, k))
                    for k, item in value.items()
                }
        else:
            return _convert_scalar(hint, value, path)
        raise _WrongTypeError(path, hint, value)

    def _convert_union(self, hint: Any, value: Any, path: str, default: Any) -> Any:
        failure = _WrongTypeError(path, hint, value)
        # A member of exactly the value's type goes first, so that 1 stays an int for float | int.
        for member in sorted(typing.get_args(hint), key=lambda member: member is not type(value)):
            try:
                return self._convert(member, value, path, default)
            except _WrongTypeError as error:
                if error.path != path:  # the right kind of list or map, with one wrong item: more telling
                    failure = error
        raise failure

    def _convert_items(self, hint: Any, value: Any, path: str) -> list[Any] | tuple[Any, ...]:
        kind, arguments = typing.get_origin(hint) or hint, typing.get_args(hint)
        fixed = kind is tuple and bool(arguments) and arguments[-1] is not Ellipsis
        if not isinstance(value, list) or (fixed and len(value) != len(arguments)):
            raise _WrongTypeError(path, hint, value)
        hints = arguments if fixed else (arguments[0] if arguments else Any,) * len(value)
        items = [
            self._convert(item_hint, item, f"{path}.{index}")
            for index, (item_hint, item) in enumerate(zip(hints, value, strict=True))
        ]
        return items if kind is list else tuple(items)

    def _where(self, path: str) -> str:
        origin = self.tree.origin(path)
        return f" ({origin})" if origin else ""

    def _unknown(self, path: str) -> typing.NoReturn:
        hint = suggest(path, list(keys_of(self.root)))
        command = getattr(self.root, "EXPLAINED_BY", None)
        pointer = "" if command is None else f"{' See' if hint.endswith('?') else '; see'}: {command}"
        raise CordError(f"unknown key '{path}'{self._where(path)}{hint}{pointer}")


def _convert_scalar(hint: Any, value: Any, path: str) -> Any:
    if hint is float:
        if type(value) in (int, float) and not math.isnan(value):
            return float(value)
        if isinstance(value, str) and FLOAT_PATTERN.match(value) and value != ".nan":
            return float(value.replace(".inf", "inf"))
    elif hint is Path:
        if isinstance(value, str) and value:
            return Path(value)
    elif hint not in (bool, int, str, type(None)):
        raise TypeError(f"{path}: a configuration field has the unsupported type {hint}")
    elif type(value) is hint:  # not isinstance: True is no int here
        return value
    raise _WrongTypeError(path, hint, value)


def _default(field: dataclasses.Field[Any], hint: Any) -> Any:
    """Return the default; for a section whose default is its own class, MISSING, so that what it requires is named."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return (
        dataclasses.MISSING
        if field.default_factory is hint and dataclasses.is_dataclass(hint)
        else field.default_factory()
    )


def keys_of(cls: Any, path: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields below a dataclass, sections left out; a map of sections has one, NAME."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        name, hint = _join(path, field.name), hints[field.name]
        for section, below in sections_in(hint, name):
            yield from keys_of(section, below)
        if is_plain(hint):
            yield name


def sections_in(hint: Any, path: str) -> Iterator[tuple[type, str]]:
    """Yield the dataclasses within a field's type, each with its dotted name; names of a map are the user's."""
    if dataclasses.is_dataclass(hint):
        yield typing.cast(type, hint), path
    elif typing.get_origin(hint) is dict:
        yield from sections_in(typing.get_args(hint)[1], f"{path}.NAME")
    elif typing.get_origin(hint) in (Union, types.UnionType):
        for member in typing.get_args(hint):
            yield from sections_in(member, path)


def is_plain(hint: Any) -> bool:
    """Return whether a field of this type may be a value, not only a section or a map of sections."""
    if typing.get_origin(hint) in (Union, types.UnionType):
        return any(is_plain(member) and member is not type(None) for member in typing.get_args(hint))
    return next(sections_in(hint, ""), None) is None


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def describe_type(hint: Any) -> str:
    """Return a field's type in words."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join("null" if choice is None else str(choice) for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(describe_type(member) for member in arguments)
    if dataclasses.is_dataclass(hint):
        return "a section of 'key: value' lines"
    if origin is tuple and arguments and Ellipsis not in arguments:
        return f"a list of {len(arguments)} values ({', '.join(describe_type(item) for item in arguments)})"
    if (origin or hint) in (list, tuple):
        return f"a list of {describe_type(arguments[0])}" if arguments else "a list"
    if (origin or hint) is dict:
        return f"a map of {describe_type(arguments[0])} to {describe_type(arguments[1])}" if arguments else "a map"
    return {type(None): "null", bool: "true or false", Path: "a path", Any: "anything"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


def _shorten(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
