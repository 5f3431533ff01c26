"""Local copies of remote shards: whole and verified or absent, within a bound, shared by the processes of a node.

A copy is fetched under a hidden name while its lock is held, compared with the manifest's checksum, and renamed. So a
process that is killed leaves at most a part that the next one overwrites, and the ranks of a node fetch a shard once.
Copies are named by their checksums: sets that share a shard, and runs that share a directory, share its copy. Where the
directory grows beyond the bound, the copies that were not used for longest are removed; a reader whose copy is gone
fetches it again.

Addresses are any that fsspec knows: https://…, hf://datasets/OWNER/NAME/…, s3://… with s3fs, file://… for a slow shared
disk. What it simplifies: a connection that breaks is taken up at its byte where the server allows it, and else anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
from filelock import FileLock
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError

from megatron_cord.data.shards.manifest import ShardEntry
from megatron_cord.errors import CordError

logger = logging.getLogger(__name__)

_CHUNK = 4 << 20  # bytes
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two attempts
_SILENCE = 30.0  # seconds after which a connection without a byte is broken
_ABANDONED = 3600.0  # seconds after which an unchanged partial file is a killed process's
_COPY = re.compile(r"[0-9a-f]{64}\.tar")  # others in the directory, such as a user's own, are never removed
_PARTIAL = re.compile(r"\.[0-9a-f]{64}\.tar\.partial")
_GONE = (FileNotFoundError, EntryNotFoundError, RepositoryNotFoundError)


class FetchError(Exception):
    """A file that cannot be had; the message says why and what was tried."""


@dataclass(frozen=True)
class RemoteFile:
    """A file behind an address.

    Attributes:
        address: of the file.
        patience: seconds for which a connection that fails is tried again.
        stopping: gives up between two chunks or attempts once it is set.
    """

    address: str
    patience: float = 60.0
    stopping: threading.Event = field(default_factory=threading.Event)

    def read(self) -> bytes:
        """Return the whole content.

        Raises:
            FetchError: it is not there, or does not come.
        """
        parts: list[bytes] = []
        self._attempt(lambda done: self._copy(done, parts.append), parts.clear)
        return b"".join(parts)

    def save(self, path: Path) -> str:
        """Write the content to a file and return its SHA-256 in hexadecimal digits.

        Raises:
            FetchError: it is not there, or does not come.
            OSError: the file cannot be written.
        """
        digest = hashlib.sha256()
        with path.open("wb") as file:

            def add(chunk: bytes) -> None:
                try:
                    file.write(chunk)
                except OSError as error:
                    raise _LocalError(error) from error
                digest.update(chunk)

            def restart() -> None:
                nonlocal digest
                file.seek(0)
                file.truncate()
                digest = hashlib.sha256()

            try:
                self._attempt(lambda done: self._copy(done, add), restart)
            except _LocalError as error:
                raise error.reason from None
        return digest.hexdigest()

    def _copy(self, done: int, add: Callable[[bytes], None]) -> Iterator[int]:
        """Hand on the content from byte `done` on; yield the bytes handed on so far."""
        system, path = self._system()
        with system.open(path, "rb") as source:
            if done:
                source.seek(done)
            while chunk := source.read(_CHUNK):
                add(chunk)
                done += len(chunk)
                yield done

    def _system(self) -> tuple[Any, str]:
        """Return the file system of the address, and the path there."""
        try:
            system, path = fsspec.core.url_to_fs(self.address, **_options(self.address))
        except (ImportError, ValueError) as error:  # a library that is not installed, an unknown protocol
            raise FetchError(f"{self.address}: {_reason(error)}") from error
        return system, path

    def _attempt(self, copy: Callable[[int], Iterator[int]], restart: Callable[[], None]) -> None:
        """Copy to the end; after a failure go on where it stopped, or anew, with growing pauses."""
        begun, done, furthest, pause, failures = time.monotonic(), 0, 0, _FIRST_PAUSE, 0
        while True:
            try:
                for now in copy(done):
                    done = now
                    if now > furthest:  # more than ever came: patience begins again
                        begun, furthest, pause = time.monotonic(), now, _FIRST_PAUSE
                    if self.stopping.is_set():
                        raise FetchError(f"{self.address}: given up, as the run ends")
                return
            except (FetchError, _LocalError):
                raise
            except _GONE as error:
                raise FetchError(f"{self.address}: {_reason(error)}") from error
            except Exception as error:  # each file system has errors of its own
                failures += 1
                waited = time.monotonic() - begun
                if waited >= self.patience or self.stopping.is_set():
                    tries = f"{failures} attempts in {waited:.0f} s"
                    raise FetchError(f"{self.address}: {_reason(error)} ({tries})") from error
                if failures == 1:
                    logger.warning("%s: %s; trying again for %.0f s", self.address, _reason(error), self.patience)
                if isinstance(error, (ValueError, NotImplementedError)) and done:  # a source that cannot seek
                    restart()
                    done = 0
                self.stopping.wait(min(pause, max(0.0, self.patience - waited)))
                pause = min(2 * pause, _LONGEST_PAUSE)


class _LocalError(Exception):
    """The copy cannot be written."""

    def __init__(self, reason: OSError) -> None:
        self.reason = reason


class ShardCache:
    """A directory of copies. Its methods may be called by several threads and processes at a time.

    Args:
        directory: created when missing; best on a disk of the node.
        limit: bytes that copies may take together.
        patience: seconds for which a connection that fails is tried again.
    """

    def __init__(self, directory: Path, limit: int, patience: float) -> None:
        self.directory, self.limit, self.patience = directory, limit, patience
        self._stopping = threading.Event()

    def place(self, entry: ShardEntry) -> Path:
        """Return where the copy of a shard is, or would be."""
        return self.directory / f"{entry.sha256}.tar"

    def fetch(self, address: str, entry: ShardEntry) -> Path:
        """Return the copy of a shard, made first where it is missing.

        Args:
            address: of the shard.
            entry: its size and checksum.

        Raises:
            FetchError: it is not there, does not come, or is another than the manifest says.
            CordError: the directory cannot be written.
        """
        path = self.place(entry)
        try:
            if self._is_there(path, entry):
                return path
            self.directory.mkdir(parents=True, exist_ok=True)
            with FileLock(self.directory / f".{path.name[:2]}.lock"):  # one for many, as locks stay
                if not self._is_there(path, entry):  # another process may have fetched it meanwhile
                    self._make_room(entry.bytes)
                    self._save(address, entry, path)
            return path
        except OSError as error:
            raise CordError(
                f"data.cache_dir={self.directory} cannot be written ({error.strerror or error}); free some space, "
                "lower data.cache_bytes, or choose another directory"
            ) from error

    def used(self, path: Path) -> None:
        """Note that a copy is read now, so that others are removed before it."""
        with contextlib.suppress(OSError):  # it is gone, or another user's
            os.utime(path)

    def stop(self) -> None:
        """Give up what is being fetched."""
        self._stopping.set()

    def _is_there(self, path: Path, entry: ShardEntry) -> bool:
        try:
            whole = path.stat().st_size == entry.bytes
        except FileNotFoundError:
            return False
        self.used(path)
        return whole

    def _save(self, address: str, entry: ShardEntry, path: Path) -> None:
        partial = path.with_name(f".{path.name}.partial")
        source = RemoteFile(address, self.patience, self._stopping)
        try:
            for attempt in (1, 2):  # a copy that arrives damaged is fetched once more
                found = source.save(partial)
                if found == entry.sha256:
                    partial.replace(path)
                    return
                size = partial.stat().st_size
                logger.warning("%s: copy %d does not have the checksum that the manifest lists", address, attempt)
        finally:
            partial.unlink(missing_ok=True)
        how = f"has {size} of {entry.bytes} bytes" if size != entry.bytes else "does not have the checksum"
        raise FetchError(f"{address} {how} that the manifest lists; restore it or make the shards again")

    def _make_room(self, needed: int) -> None:
        """Remove what was not used for longest until so many bytes more are within the limit."""
        with FileLock(self.directory / ".lock"):
            total, copies = needed, []
            files = list(self.directory.iterdir())
            for path in (file for file in files if _PARTIAL.fullmatch(file.name)):
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - path.stat().st_mtime > _ABANDONED:
                        path.unlink()
                    else:
                        total += path.stat().st_size
            for path in (file for file in files if _COPY.fullmatch(file.name)):
                with contextlib.suppress(FileNotFoundError):
                    copies.append((path.stat().st_mtime, path.stat().st_size, path))
            total += sum(size for _, size, _ in copies)
            for _, size, path in sorted(copies):
                if total <= self.limit:
                    return
                path.unlink(missing_ok=True)
                total -= size


def _options(address: str) -> dict[str, Any]:
    """Return what a file system is opened with: a connection may last as long as bytes come."""
    if not address.startswith(("http://", "https://")):
        return {}
    import aiohttp  # what fsspec uses for these; another kind does without it

    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(sock_connect=_SILENCE, sock_read=_SILENCE)}}


def _reason(error: BaseException) -> str:
    """Return an error in one line."""
    if isinstance(error, _GONE):
        return "it is not there"
    lines: list[Any] = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__
