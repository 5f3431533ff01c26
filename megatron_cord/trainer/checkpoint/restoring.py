"""Reads a checkpoint into a state that may ask for other tensors than were saved.

Weights and optimizer states are stored under the names of the model's tensors, whatever the layout, the kind of
optimizer or the frozen parts were. So a run may go on with another optimizer, or with a part frozen or unfrozen:

    optimizer.state.{param,fp32_param}.NAME     the fp32 weight; where neither was saved, the weight NAME itself
    optimizer.state.{exp_avg,exp_avg_sq}.NAME   Adam's moments; zero for a tensor that had none
    optimizer.state.momentum_buffer.NAME        Muon's momentum; likewise
    teacher.NAME                                a moving average; where there was none, the weight NAME

What it simplifies: Adam counts its updates for all tensors together, so moments that begin at zero in the middle of a
run are not corrected for that.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedBase, ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.trainer.checkpoint.manifest import find_damage_here

T = TypeVar("T")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_MASTERS = ("param", "fp32_param")  # the fp32 weights of the distributed optimizer, and of the other one
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")
_TEACHER = "teacher."
_PASSES = ("own", "masters", "averages")  # readings of the files; within one, a tensor goes to one place


@dataclass(frozen=True)
class Restored:
    """A state whose tensors are read.

    Attributes:
        state: as it was given, with tensors in the place of their descriptions.
        adam_steps: updates that the optimizer had made; 0 if the checkpoint does not tell.
        fresh: parts of the model, such as the adapter, with tensors whose moments begin at zero as there were none.
        changed: parts with tensors whose moments begin at zero as another kind of optimizer left others.
        dropped: parts with saved moments that are not used any more.
    """

    state: dict[str, Any]
    adam_steps: int
    fresh: tuple[str, ...]
    changed: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """Where a tensor is read: under which name, in which pass. Without a name, it begins at zero."""

    name: str | None
    reading: str = "own"


def restore(path: Path, wanted: dict[str, Any]) -> Restored:
    """Read a checkpoint's tensors into a sharded state. Collective.

    Raises:
        CordError: the checkpoint lacks a weight, or a file of it is damaged.
    """
    saved: set[str] = _reading(path, lambda: set(dist_checkpointing.load_tensors_metadata(str(path))))
    leaves: list[ShardedBase] = []
    dict_list_map_outplace(lambda leaf: leaves.append(leaf) if isinstance(leaf, ShardedBase) else None, wanted)
    sources = _find_sources(path, leaves, saved)
    values: dict[int, Any] = {
        i: torch.zeros_like(leaf.data) for i, leaf in enumerate(leaves) if sources[i].name is None
    }
    common: dict[str, Any] = {}
    for reading in _PASSES:
        asked = {str(i): _at(leaf, sources[i]) for i, leaf in enumerate(leaves) if sources[i].reading == reading}
        asked = {i: leaf for i, leaf in asked.items() if int(i) not in values}
        if any(all_gather_json(bool(asked))):
            common = _load(path, asked)
            values |= {int(i): common.pop(i) for i in asked}
    numbers = iter(range(len(leaves)))

    def value_of(leaf: Any) -> Any:
        if isinstance(leaf, ShardedBase):
            return values[next(numbers)]
        return leaf.unwrap() if isinstance(leaf, LocalNonpersistentObject) else leaf

    state = dict_list_map_outplace(value_of, wanted)
    steps = [step for step in _find(common, "step") if isinstance(step, int)]
    fresh = _moments(_gather(leaf.key for leaf, source in zip(leaves, sources, strict=True) if source.name is None))
    had = _moments(saved)
    used = _moments(_gather(leaf.key for leaf in leaves)) if "optimizer" in wanted else had
    return Restored(state, max(steps, default=0), _parts(fresh - had), _parts(fresh & had), _parts(had - used))


def _find_sources(path: Path, leaves: list[ShardedBase], saved: set[str]) -> list[_Source]:
    """Return where each tensor is read.

    Raises:
        CordError: a tensor that cannot begin at zero is nowhere.
    """
    states = {match.groups(): name for name in saved if (match := _STATE.fullmatch(name))}
    sources, missing = [], []
    for leaf in leaves:
        match = _STATE.fullmatch(leaf.key)
        if isinstance(leaf, ShardedObject):  # not among the tensors; Megatron looks for it
            source: _Source | None = _Source(leaf.key)
        elif match is not None:
            source = _source_of_state(match[1], match[2], states, saved)
        elif leaf.key not in saved and leaf.key.removeprefix(_TEACHER) in saved:
            source = _Source(leaf.key.removeprefix(_TEACHER), "averages")
        else:
            source = _Source(leaf.key) if leaf.key in saved else None
        if source is None:
            missing.append(leaf.key)
        else:
            sources.append(source)
    if lacking := sorted(_gather(missing)):
        raise CordError(
            f"{path} is whole, but {lacking[0]} and what else these settings need ({len(lacking)} tensors) was not "
            f"saved; use the settings that {path / 'state.json'} lists"
        )
    return sources


def _source_of_state(kind: str, name: str, states: dict[tuple[str, ...], str], saved: set[str]) -> _Source | None:
    kinds = _MASTERS if kind in _MASTERS else (kind,)
    for other in (kind, *kinds):
        if (other, name) in states:
            return _Source(states[other, name])
    if kind in _MASTERS:
        return _Source(name, "masters") if name in saved else None
    return _Source(None) if kind in _MOMENTS else None


def _at(leaf: ShardedBase, source: _Source) -> ShardedBase:
    return leaf if source.name in (None, leaf.key) else replace(leaf, key=source.name)


def _load(path: Path, asked: dict[str, ShardedBase]) -> dict[str, Any]:
    state: dict[str, Any] = _reading(path, lambda: dist_checkpointing.load(asked, str(path)))
    return state


def _reading(path: Path, read: Callable[[], T]) -> T:
    """Read, and tell a file that is not as it was written from one that does not fit the settings."""
    try:
        return read()
    except (
        CheckpointException,  # is no Exception, and would pass through every other handler
        CheckpointingException,
        OSError,
        EOFError,
        pickle.UnpicklingError,
        KeyError,
        ValueError,
    ) as error:
        damage = find_damage_here(path)
        if damage is not None:
            raise CordError(f"{path} is damaged ({damage}); restore it, or choose another with resume=PATH") from error
        raise CordError(
            f"{path} is as it was written, but cannot be loaded with these settings ({type(error).__name__}: "
            f"{_first_line(error)}); use the settings that {path / 'state.json'} lists"
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no reason given").splitlines()[0][:200]


def _find(tree: Any, name: str) -> Iterator[Any]:
    """Yield the values under this name anywhere in nested maps and lists."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key == name:
                yield value
            else:
                yield from _find(value, name)
    elif isinstance(tree, list):
        for item in tree:
            yield from _find(item, name)


def _gather(names: Iterable[str]) -> set[str]:
    """Return the names of all ranks."""
    return {name for share in all_gather_json(sorted(set(names))) for name in share}


def _moments(names: Iterable[str]) -> set[str]:
    """Return the names of the tensors that have moments among these states."""
    matches = (_STATE.fullmatch(name) for name in names)
    return {match[2] for match in matches if match is not None and match[1] in _MOMENTS}


def _parts(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted({name.split(".")[0] for name in names}))
