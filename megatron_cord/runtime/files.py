"""Files that are whole or absent, and digests of what they hold."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import secrets
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from megatron_cord.errors import CordError

_ENDS = 1 << 20  # bytes at both ends of a file that stand for its content
_SYNC_FILE_RANGE_WRITE = 2  # of Linux's fcntl.h


@contextlib.contextmanager
def atomic_file(path: Path | str, *, sync: bool = False) -> Iterator[IO[bytes]]:
    """Open a hidden file beside `path` that takes its name when the block ends, and is removed when the block raises.

    Readers see the old content or the new one, whole. Directories that lack are made.

    Args:
        path: the file to write or replace.
        sync: force the content to the disk before it takes the name, for what must survive a loss of power.

    Raises:
        OSError: the directory cannot be made or written to.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        with partial.open("wb") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_atomic(path: Path | str, content: str | bytes, *, sync: bool = False) -> None:
    """Write `content`, text in UTF-8, as `atomic_file` does."""
    with atomic_file(path, sync=sync) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def write_json(path: Path | str, value: Any, *, sync: bool = False) -> None:
    """Write `value` as indented JSON in UTF-8, as `atomic_file` does."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n", sync=sync)


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Args:
        path: of the file.
        remedy: what the user should do about a damaged one, for the message.

    Raises:
        CordError: it cannot be read, is not JSON in UTF-8, or holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CordError(f"{path} is not readable JSON ({error}); {remedy}") from error
    if not isinstance(content, dict):
        raise CordError(f"{path} holds no JSON object; {remedy}")
    return content


def file_digest(path: Path | str) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(parts: Iterable[str | int]) -> str:
    """Return 16 hexadecimal digits that stand for these parts in their order."""
    digest = hashlib.sha256()
    for part in parts:
        encoded = str(part).encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]


def checkpoint_fingerprint(
    checkpoint: Path, suffixes: Collection[str] = (".safetensors", ".distcp", ".json", ".metadata")
) -> str:
    """Return a fingerprint of a checkpoint's directory: names, sizes, and both ends of its files of these kinds."""
    parts: list[str | int] = []
    for path in sorted(path for path in checkpoint.iterdir() if path.suffix in suffixes):
        size = path.stat().st_size
        with path.open("rb") as file:
            digest = hashlib.sha256(file.read(_ENDS))
            file.seek(max(0, size - _ENDS))
            digest.update(file.read())
        parts += [path.name, size, digest.hexdigest()]
    return fingerprint(parts)


def start_writing(descriptor: int, offset: int, length: int) -> None:
    """Have the kernel write these bytes of a file to the disk now, without waiting, instead of all bytes at the end.

    Where the system has no such call, they are written at the end.
    """
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call(descriptor, ctypes.c_int64(offset), ctypes.c_int64(length), _SYNC_FILE_RANGE_WRITE)
