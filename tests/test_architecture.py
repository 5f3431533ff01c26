"""Imports between rooms and files: arrows point down, and nothing imports in a circle."""

from __future__ import annotations

import ast
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest

import megatron_cord

PACKAGE = Path(megatron_cord.__file__).parent
#: The rooms, top to bottom, as docs/architecture.md draws them: a room imports those below it alone.
ROOMS = (
    "cli", "lmms_eval", "train", "evaluate", "launch", "verify", "compare", "report", "plan", "warmup", "trainer",
    "evaluation", "rollout", "reward", "speech", "data", "convert", "model", "losses", "parallel", "config", "runtime",
    "errors",
)  # fmt: skip

Graph = Mapping[str, Iterable[str]]


def find_circle(graph: Graph) -> list[str] | None:
    """Return the nodes of a circle, its first node repeated at the end; None for a graph without one."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in done:
            return None
        for following in sorted(graph.get(node, ())):
            if circle := visit(following, [*path, node]):
                return circle
        done.add(node)
        return None

    return next((circle for node in sorted(graph) if (circle := visit(node, []))), None)


@functools.cache
def _sources() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in PACKAGE.rglob("*.py")
    }


def source_of(module: str) -> Path:
    """Return the file of a module."""
    return _sources()[module]


@functools.cache
def imports() -> dict[str, set[str]]:
    """Return for each module of the package those that its source names in an import, at any depth of the file."""
    sources = _sources()
    found: dict[str, set[str]] = {name: set() for name in sources}
    for name, path in sources.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                found[name].update(
                    full if (full := f"{node.module}.{alias.name}") in sources else node.module for alias in node.names
                )
            elif isinstance(node, ast.Import):
                found[name].update(alias.name for alias in node.names)
        found[name] &= sources.keys() - {name}
    return found


def collapsed(package: str) -> dict[str, set[str]]:
    """Return the imports between the children of a package: files, and sub-packages as one node each."""
    depth = package.count(".") + 1
    graph: dict[str, set[str]] = defaultdict(set)
    for importer, imported in imports().items():
        for target in imported:
            ends = [name for name in (importer, target) if name.startswith(f"{package}.") or name == package]
            if len(ends) == 2:
                first, second = (".".join(name.split(".")[: depth + 1]) for name in ends)
                if first != second:
                    graph[first].add(second)
    return graph


def packages() -> list[str]:
    """Return the dotted names of all packages."""
    return sorted(".".join(p.parent.relative_to(PACKAGE.parent).parts) for p in PACKAGE.rglob("__init__.py"))


def test_rooms_import_only_what_is_below_them() -> None:
    """Catches an import upwards, and a room that has no place in the order."""
    graph = collapsed("megatron_cord")
    names = {name.partition(".")[2].partition(".")[0] for name in imports()} - {""}
    assert names == set(ROOMS)
    place = {f"megatron_cord.{room}": number for number, room in enumerate(ROOMS)}
    upwards = [
        f"{room} imports {target}"
        for room, targets in graph.items()
        for target in targets
        if room in place and target in place and place[target] < place[room]
    ]
    assert not upwards, "\n".join(upwards)


@pytest.mark.parametrize("package", packages())
def test_no_circle_inside_a_room(package: str) -> None:
    """Catches two files, or two sub-rooms, that import each other, directly or not, for types alone too."""
    assert (circle := find_circle(collapsed(package))) is None, " → ".join(circle or ())


def test_the_search_for_circles_finds_one() -> None:
    """Catches a check that passes because it sees nothing."""
    assert find_circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert find_circle({"a": ["b", "c"], "b": ["c"]}) is None
    assert len(imports()) > 100 and sum(map(len, imports().values())) > 300
