"""Copy what a run reads to a disk of this node, and print the overrides that name the copies, one a line.

``python -m examples.slurm.stage trainer|servers DIRECTORY --config FILE [a.b=value …]``

Copied are the model's checkpoint and, for trainers, the sets of shards. A file is checked by the checksum of its set's
manifest, or by its size, and takes its name when it is whole, so an interrupted copy is continued by the next one and a
second job on the node copies nothing. All shards are copied to every node: the order of the samples is drawn anew each
epoch, so every rank comes to need all of them. The run's own checkpoints are not staged: on the disk of a node they
would be lost with it, and they are written behind training anyway.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
import sys
from pathlib import Path

from megatron_cord.config.loading import load_config
from megatron_cord.data.config import DataConfig
from megatron_cord.data.shards.manifest import MANIFEST_NAME, Manifest
from megatron_cord.errors import CordError
from megatron_cord.model.checkpoint_directory import checkpoint_directory
from megatron_cord.runtime import entry
from megatron_cord.runtime.files import atomic_file, fingerprint

logger = logging.getLogger(__name__)
ROLES = ("trainer", "servers")
_BLOCK = 1 << 24  # bytes


def main() -> None:
    """Stage for the role and the directory that the first two arguments name."""
    from megatron_cord.trainer.config import RunConfig

    words = sys.argv[1:]
    if len(words) < 2 or words[0] not in ROLES:
        raise CordError("usage: python -m examples.slurm.stage trainer|servers DIRECTORY --config FILE [a.b=value …]")
    role, directory, *rest = words
    arguments = entry.parse_args("Copies what a run reads to a disk of this node.", arguments=rest)
    config = load_config(RunConfig, arguments.config, arguments.overrides)
    found = {"model.checkpoint": checkpoint_directory(config.model.checkpoint)}
    if role == "trainer":
        found |= sets_of(config.data)
    for key, source in found.items():
        print(f"{key}={stage(source, Path(directory))}")


def sets_of(data: DataConfig) -> dict[str, Path]:
    """Return the sets that can be copied by the key that names them; the others are read where they are."""
    named = {"data.train": data.train} if isinstance(data.train, str) else {}
    if not isinstance(data.train, str):
        named = {f"data.train.{name}.path": each.path for name, each in data.train.items()}
    named["data.evaluation"] = data.evaluation
    for key, path in named.items():
        if not (Path(path) / MANIFEST_NAME).is_file():
            logger.info("%s=%s is no directory with a manifest; it is read where it is", key, path)
    return {key: Path(path) for key, path in named.items() if (Path(path) / MANIFEST_NAME).is_file()}


def stage(source: Path, directory: Path) -> Path:
    """Copy the files of a checkpoint or of a set of shards; return the directory of the copies.

    Args:
        source: the directory.
        directory: on the node's disk; the copies get a directory there that is named after the source's path.

    Raises:
        CordError: the disk is too small, or a copy is not what the manifest says.
    """
    target = directory / f"{source.resolve().name}-{fingerprint([str(source.resolve())])}"
    digests: dict[str, str] = {}
    if (source / MANIFEST_NAME).is_file():
        digests = {shard.name: shard.sha256 for shard in Manifest.read(source).shards}
        names = [*digests, MANIFEST_NAME]  # the manifest last: a directory with one is complete
    else:
        names = sorted(path.name for path in source.iterdir() if path.is_file())
    missing = [name for name in names if not _is_same(source / name, target / name)]
    size = sum((source / name).stat().st_size for name in missing)
    target.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target).free
    if size > free:
        raise CordError(
            f"{directory} has {free / 1e9:.1f} GB free, and {source} needs {size / 1e9:.1f} GB; stage elsewhere, or "
            "leave CORD_STAGE out"
        )
    if missing:
        logger.info("copying %d files of %s, %.1f GB, to %s", len(missing), source, size / 1e9, target)
    for name in missing:
        _copy(source / name, target / name, digests.get(name))
    return target


def _is_same(source: Path, copy: Path) -> bool:
    """Return whether a copy is there: of the same size, and no older than its source."""
    if not copy.is_file():
        return False
    there, here = source.stat(), copy.stat()
    return there.st_size == here.st_size and here.st_mtime >= there.st_mtime


def _copy(source: Path, copy: Path, sha256: str | None) -> None:
    digest = hashlib.sha256()
    try:
        with source.open("rb") as reading, atomic_file(copy) as writing:
            while block := reading.read(_BLOCK):
                digest.update(block)
                writing.write(block)
            if sha256 is not None and digest.hexdigest() != sha256:
                raise CordError(f"{source} does not have the checksum that its manifest lists; make the shards again")
    except OSError as error:
        raise CordError(f"{source} cannot be copied to {copy}: {error.strerror}") from None


if __name__ == "__main__":
    entry.run(main)
