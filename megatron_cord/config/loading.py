"""Turns a YAML file and ``a.b=c`` overrides into dataclasses, and dataclasses back into YAML.

A component declares its configuration as a dataclass beside it; this file knows none of them. Supported field types: bool, int,
float, str, Path, Literal, Any, unions (with None), list, tuple, dict, and dataclasses of these. A wrong value is one line that
names the dotted field, what was expected, what was given and where. Ranges are checked by a dataclass's own ``__post_init__``,
which raises ValueError (or CordError); the path of the section is put in front. ``field(metadata={"secret": True})`` keeps a value out
of dumps and messages.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import math
import os
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import yaml

from megatron_cord.config.source import FLOAT_PATTERN, Tree, read_tree
from megatron_cord.errors import CordError

Config = TypeVar("Config")
REDACTED = "***"


def load_config(cls: type[Config], path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """An instance of the dataclass ``cls`` from the YAML file at ``path`` (None: defaults only) and ``a.b=value`` overrides.

    Raises CordError for anything wrong in the file or in an override; later overrides win over earlier ones and over the file.
    """
    tree = read_tree(path, overrides)
    return _Reader(cls, tree, "the configuration" if path is None else str(path)).section(cls, tree.values, "")


def to_dict(config: Any) -> dict[str, Any]:
    """The plain maps, lists and scalars of a configuration dataclass; fields marked secret read ``***`` when they are set."""
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name] = REDACTED if field.metadata.get("secret") and value else _plain(value)
    return plain


def dump_config(config: Any, path: Path | str) -> None:
    """Writes ``to_dict(config)`` as YAML that ``load_config`` reads back; the file is complete or absent, never half written.

    Raises CordError, naming the file, when it cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", encoding="utf-8") as file:
            yaml.dump(to_dict(config), file, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=140)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise CordError(
            f"{target}: cannot write the configuration: {error.strerror}; choose another place or free some space"
        ) from None


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a YAML 1.1 reader or ours would take for something else."""


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
    """Builds the dataclasses of one configuration; ``root`` and ``file`` are for messages."""

    def __init__(self, root: type, tree: Tree, file: str) -> None:
        self.root, self.tree, self.file = root, tree, file

    def section(self, cls: type[Config], given: dict[Any, Any], path: str, defaults: Any = None) -> Config:
        """``cls`` from ``given``, the map at ``path``; what is not given keeps the value of ``defaults``, of type ``cls``, if any."""
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
            shown = "another value" if field.metadata.get("secret") else _shorten(error.value)
            raise CordError(
                f"{error.path}: expected {describe_type(error.hint)}, got {shown}{self._where(error.path)}"
            ) from None

    def _convert(self, hint: Any, value: Any, path: str, default: Any = None) -> Any:
        """``value`` as the type ``hint``. Raises _WrongTypeError when it does not fit."""
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
        return kind(
            self._convert(item_hint, item, f"{path}.{index}")
            for index, (item_hint, item) in enumerate(zip(hints, value))
        )

    def _where(self, path: str) -> str:
        origin = self.tree.origin(path)
        return f" ({origin})" if origin else ""

    def _unknown(self, path: str) -> typing.NoReturn:
        leaf = path.rpartition(".")[2]

        def nearness(name: str) -> float:
            # The right name in the wrong section beats a resembling path.
            return difflib.SequenceMatcher(None, path, name).ratio() + (name.rpartition(".")[2] == leaf)

        nearest = max(_names(self.root, ""), key=nearness, default=None)
        hint = f"; did you mean '{nearest}'?" if nearest else ""
        raise CordError(f"unknown key '{path}'{self._where(path)}{hint}")


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
    """The field's default. A section whose default is its own class counts as not given, so that what it requires is named."""
    if field.default_factory is dataclasses.MISSING:
        return field.default
    return (
        dataclasses.MISSING
        if field.default_factory is hint and dataclasses.is_dataclass(hint)
        else field.default_factory()
    )


def _names(cls: Any, path: str) -> Iterator[str]:
    """The dotted names of every field below a dataclass, sections included."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        yield (name := _join(path, field.name))
        for member in (hints[field.name], *typing.get_args(hints[field.name])):
            if dataclasses.is_dataclass(member):
                yield from _names(member, name)


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def describe_type(hint: Any) -> str:
    """A field's type in words."""
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
