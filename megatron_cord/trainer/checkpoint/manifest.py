"""The list of a checkpoint's files with sizes and checksums, written last: a directory without one is not whole."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist

from megatron_cord.parallel.objects import all_gather_json
from megatron_cord.runtime.files import file_digest, write_json

NAME = "manifest.json"
_FORMAT = 1


def write_manifest(directory: Path, known: Mapping[str, str]) -> None:
    """List all files of the directory, and sync those to the disk that their writers did not.

    Args:
        directory: a checkpoint that is complete but for this file.
        known: digests by file name, of files that their writers have synced.
    """
    files = {}
    for path in sorted(p for p in directory.iterdir() if p.is_file()):
        if path.name not in known:
            _sync(path)
        files[path.name] = {"bytes": path.stat().st_size, "sha256": known.get(path.name) or file_digest(path)}
    write_json(directory / NAME, {"format": _FORMAT, "files": files}, sync=True)
    _sync(directory)


def find_damage(directory: Path) -> str | None:
    """Return what is wrong with a checkpoint, naming the file; None if every file is as it was written.

    Collective: each rank reads its share of the files.
    """
    mine = _find_damage(directory, dist.get_rank(), dist.get_world_size())
    return next((found for found in all_gather_json(mine) if found is not None), None)


def find_damage_here(directory: Path) -> str | None:
    """Return the same from this rank alone, which reads all files; None also for a checkpoint without a manifest."""
    return _find_damage(directory, 0, 1) if (directory / NAME).is_file() else None


def _find_damage(directory: Path, share: int, shares: int) -> str | None:
    """Return what is wrong with a share of the files."""
    try:
        manifest = json.loads((directory / NAME).read_text())
        files: list[tuple[str, int, str]] = sorted(
            (name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()
        )
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{NAME} cannot be read"
    found = (_compare(directory / name, size, checksum) for name, size, checksum in files[share::shares])
    return next(filter(None, found), None)


def _compare(path: Path, size: int, checksum: str) -> str | None:
    try:
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} of {size} bytes"
        if file_digest(path) != checksum:
            return f"{path.name} does not have the checksum that it was written with"
        return None
    except OSError as error:
        return f"{path.name}: {error.strerror}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
