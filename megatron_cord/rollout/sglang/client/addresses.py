"""Where the servers are, and the key that they require: the configuration, or files that ``cord serve`` writes."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_cord.errors import CordError
from megatron_cord.rollout.sglang.client.endpoint import Endpoint
from megatron_cord.runtime.files import write_json

KEY_VARIABLE = "MEGATRON_CORD_SERVER_KEY"  #: the environment variable that holds the servers' API key


@dataclass(frozen=True)
class Addresses:
    """Where to look for servers; `find` looks again each time, as servers come and go.

    Attributes:
        servers: http://host:port of each; or
        servers_file: a file of addresses, or a directory of such files, one a node.
        api_key_file: of the key; the environment variable ``MEGATRON_CORD_SERVER_KEY`` if None.
    """

    servers: tuple[str, ...] = ()
    servers_file: Path | None = None
    api_key_file: Path | None = None

    def find(self) -> list[Endpoint]:
        """Return the servers of now, each once; none while no file is there.

        Raises:
            CordError: a malformed address, a damaged file, a missing key.
        """
        urls = list(self.servers)
        if self.servers_file is not None:
            files = sorted(self.servers_file.glob("*.json")) if self.servers_file.is_dir() else [self.servers_file]
            urls += [url for file in files for url in read_servers_file(file)]
        return [Endpoint(url, self.key) for url in dict.fromkeys(urls)]

    @property
    def key(self) -> str:
        """The API key; empty if there is none. Raises as `read_key`."""
        return read_key(self.api_key_file)

    @property
    def described(self) -> str:
        """The setting that names the servers, for messages."""
        if self.servers_file is None:
            return "rollout.sglang.servers"
        return f"rollout.sglang.servers_file {self.servers_file}"


def read_servers_file(file: Path) -> list[str]:
    """Return the addresses in a file that `write_servers_file` wrote; none if it is not there.

    Raises:
        CordError: it holds something else.
    """
    try:
        urls = json.loads(file.read_text())["servers"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CordError(f"{file} is no file of servers ({error}); let cord serve write it") from None
    if not isinstance(urls, list) or not all(isinstance(url, str) for url in urls):
        raise CordError(f"{file}: 'servers' must be a list of addresses; let cord serve write it")
    return urls


def write_servers_file(file: Path, checkpoint: Path, version: str, urls: Sequence[str]) -> None:
    """Write the file, whole or not at all.

    Raises:
        CordError: it cannot be written.
    """
    try:
        write_json(file, {"checkpoint": str(checkpoint), "sglang": version, "servers": list(urls)})
    except OSError as error:
        raise CordError(
            f"{file}: cannot write the servers' addresses: {error.strerror}; choose another place"
        ) from None


def read_key(file: Path | None) -> str:
    """Return the API key, from the file or the environment; empty if there is none.

    Raises:
        CordError: the file cannot be read, is empty, or can be read by others.
    """
    if file is None:
        return os.environ.get(KEY_VARIABLE, "")
    try:
        key = file.read_text().strip()
        mode = file.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise CordError(f"{file}: cannot read the API key: {error}") from None
    if not key or not key.isprintable():
        raise CordError(f"{file} holds no API key; delete it, and cord serve makes one")
    if mode & 0o077:
        raise CordError(f"{file} holds the API key and can be read by others; make it yours alone: chmod 600 {file}")
    return key


def make_key(file: Path) -> str:
    """Return the key in the file, which is made, readable for its owner alone, if it is missing.

    Raises:
        CordError: as `read_key`, or it cannot be written.
    """
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
        with os.fdopen(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "w") as out:
            out.write(secrets.token_urlsafe(32) + "\n")
        try:
            with contextlib.suppress(FileExistsError):  # of several nodes that start together, one makes the key
                os.link(partial, file)
        finally:
            partial.unlink()
    except OSError as error:
        raise CordError(f"{file}: cannot write an API key: {error.strerror}; choose another place") from None
    return read_key(file)
