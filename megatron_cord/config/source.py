"""Read YAML files and ``a.b=c`` overrides into one plain tree with the source of each value.

``megatron_cord.config.loading`` turns the tree into dataclasses; fields are not checked here. It simplifies YAML:
scalars follow the YAML 1.2 core schema (``1e-3`` is a number, ``no`` and ``on`` are words, there are no dates), a key
may appear once in a map, and the merge key ``<<`` is not special, because ``base: other.yaml`` (relative to the file)
inherits instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import yaml

from megatron_cord.errors import CordError

FLOAT_PATTERN = re.compile(
    r"^(?:[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+|[-+]?\.inf|\.nan)$"
)


class _Loader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types
    """A SafeLoader with the scalar types of YAML 1.2."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}


_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT_PATTERN, list("-+.0123456789"))


class Tree:
    """Nested maps of plain values, with the origin of every path that was set."""

    def __init__(self) -> None:
        self.values: dict[Any, Any] = {}
        self.origins: dict[str, str] = {}

    def origin(self, path: str) -> str:
        """Return where the value at ``path``, or the nearest part around it, came from; "" for a default."""
        while path not in self.origins and "." in path:
            path = path.rpartition(".")[0]
        return self.origins.get(path, "")

    def merge(self, other: Tree) -> None:
        """Lay ``other`` over this tree: maps join key by key, anything else is replaced."""
        _merge(self.values, other.values)
        self.origins.update(other.origins)


def read_tree(path: Path | str | None, overrides: Sequence[str]) -> Tree:
    """Read the file at ``path``, with what it inherits, under the overrides, the last of which wins; None is no file.

    Raises:
        CordError: a file is missing or not valid YAML, a key is given twice, or an override is not ``a.b=value``.
    """
    tree = Tree() if path is None else _read_file(Path(path), ())
    for override in overrides:
        tree.merge(_read_override(override))
    return tree


def _read_file(path: Path, inheritors: tuple[Path, ...]) -> Tree:
    if path.resolve() in inheritors:
        raise CordError(f"{path}: 'base' leads back to a file that inherits from it; remove one of the 'base' lines")
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        by = f" (named by 'base' in {inheritors[-1]})" if inheritors else ""
        raise CordError(f"{path}: there is no such configuration file{by}; check the path") from None
    except UnicodeDecodeError:
        raise CordError(f"{path}: not a UTF-8 text file; give a YAML configuration") from None
    except OSError as error:
        raise CordError(f"{path}: cannot read the configuration: {error.strerror}") from None
    tree = Tree()
    tree.values = _parse(text, str(path), "", tree.origins) if text.strip() else {}
    if tree.values is None:  # only comments
        tree.values = {}
    if not isinstance(tree.values, dict):
        raise CordError(f"{path}: expected 'key: value' lines at the top level, got a {_kind(tree.values)}")
    base = tree.values.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or "\0" in base:
        raise CordError(f"{path}: base: expected the path of one YAML file, got {base!r}")
    inherited = _read_file(path.parent / base, (*inheritors, path.resolve()))
    inherited.merge(tree)
    return inherited


def _read_override(override: str) -> Tree:
    name, equals, text = override.partition("=")
    parts = name.split(".")
    if not equals or not all(part and part == part.strip() for part in parts):
        shown = name if equals else override  # never the value: it may be a secret
        raise CordError(f"override '{shown}': expected the form a.b=value, for example train.steps=10")
    tree = Tree()
    origin = f"override {name}"
    # A shell turns a.b='' into a.b=, so nothing after the sign means the empty text; null is written out.
    value: Any = _parse(text, origin, name, tree.origins) if text else ""
    for depth in range(len(parts)):
        tree.origins[".".join(parts[: depth + 1])] = origin
    for part in reversed(parts):
        value = {part: value}
    tree.values = value
    return tree


def _parse(text: str, source: str, path: str, origins: dict[str, str]) -> Any:
    """Return the plain value of one YAML document; fill ``origins`` with a line for each key below ``path``."""
    try:
        loader = _Loader(text)
    except yaml.YAMLError:
        raise CordError(f"{source}: not valid YAML: it holds a character that no text file has") from None
    try:
        node = loader.get_single_node()
        return None if node is None else _plain(loader, node, source, path, origins)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a scalar tagged as what it is not, such as !!int word
        if path:  # YAML's own words may quote the value, which may be a secret
            raise CordError(
                f"{source}: the value is not valid YAML; put a text with special characters in quotes"
            ) from None
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or "a value is not what its tag says, or a character is not allowed"
        raise CordError(f"{source}{line}: not valid YAML: {problem}") from None
    except RecursionError:
        raise CordError(f"{source}: a YAML alias contains itself; write the value out") from None
    finally:
        loader.dispose()


def _plain(loader: _Loader, node: yaml.Node, source: str, path: str, origins: dict[str, str]) -> Any:
    if not isinstance(node, yaml.ScalarNode) and node.tag not in ("tag:yaml.org,2002:seq", "tag:yaml.org,2002:map"):
        raise CordError(
            f"{source}, line {node.start_mark.line + 1}: the tag {node.tag} is not supported; write plain YAML"
        )
    if isinstance(node, yaml.SequenceNode):
        return [_plain(loader, item, source, f"{path}.{index}", origins) for index, item in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return loader.construct_object(node)
    values: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = loader.construct_object(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if key is None:
            raise CordError(f"{source}, line {line}: a key must be a name or a number")
        key_path = f"{path}.{key}" if path else str(key)
        if key in values:
            raise CordError(f"{source}, line {line}: {key_path} is given twice; remove one of them")
        origins[key_path] = source if source.startswith("override ") else f"{source}, line {line}"
        values[key] = _plain(loader, value_node, source, key_path, origins)
    return values


def _merge(under: dict[Any, Any], over: dict[Any, Any]) -> None:
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(under.get(key), dict):
            _merge(under[key], value)
        else:
            under[key] = value


def _kind(value: Any) -> str:
    return "list" if isinstance(value, list) else type(value).__name__
