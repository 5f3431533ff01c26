"""References to recordings, which workers read: a file, bytes of a row, a member of a tar, an address on the hub."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_cord.data.audio.decode import decode_audio
from megatron_cord.errors import CordError

_LARGEST = 1 << 31  # bytes; an hour of 24-bit stereo at 96 kHz


class UnreadableError(CordError):
    """The reason why a recording is left out."""


class Recorded(ABC):
    """A recording that is not read yet."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """Stands for the recording among those of its source."""

    @property
    def file(self) -> Path | None:
        """The file that a user may repair, for one of its own."""
        return None

    @property
    def held(self) -> int:
        """The bytes that it takes in memory before it is read, references aside."""
        return 0

    @abstractmethod
    def read(self) -> np.ndarray:
        """Return float32 [samples] in [-1, 1], mono, 16 kHz.

        Raises:
            UnreadableError: it is missing or no recording; the message begins with what is wrong.
            CordError: what gives it is away.
        """


@dataclass(frozen=True)
class RecordedFile(Recorded):
    """A file."""

    path: Path
    given: str  #: as the row has it

    @property
    def identity(self) -> str:
        """The path as the row has it, so that a set may be moved."""
        return f"file {self.given}"

    @property
    def file(self) -> Path | None:
        """The file itself."""
        return self.path

    def read(self) -> np.ndarray:
        """Implement `Recorded.read`."""
        if not self.path.is_file():
            raise UnreadableError(f"its file is missing ({self.path})")
        try:
            if self.path.stat().st_size > _LARGEST:
                raise UnreadableError(f"its file is larger than {_LARGEST >> 30} GiB ({self.path})")
            content = self.path.read_bytes()
        except OSError as error:
            raise UnreadableError(f"its file cannot be read ({self.path}: {error.strerror})") from None
        return decoded(content, self.given)


@dataclass(frozen=True)
class RecordedBytes(Recorded):
    """Bytes that stand in the row."""

    content: bytes
    name: str

    @property
    def identity(self) -> str:
        """By its content."""
        return f"bytes {hashlib.blake2b(self.content, digest_size=16).hexdigest()}"

    @property
    def held(self) -> int:
        """Its content."""
        return len(self.content)

    def read(self) -> np.ndarray:
        """Implement `Recorded.read`."""
        return decoded(self.content, self.name)


@dataclass(frozen=True)
class RecordedMember(Recorded):
    """A member of an uncompressed tar."""

    tar: Path
    name: str
    offset: int  #: of its content, bytes
    size: int  #: bytes
    changed: float  #: when it was, as the tar says

    @property
    def identity(self) -> str:
        """Its place in the tar."""
        return f"tar {self.tar.name} {self.name} {self.offset} {self.size} {self.changed}"

    def read(self) -> np.ndarray:
        """Implement `Recorded.read`."""
        try:
            with self.tar.open("rb") as file:
                file.seek(self.offset)
                content = file.read(self.size)
        except OSError as error:
            raise UnreadableError(f"its file cannot be read ({self.tar}: {error.strerror})") from None
        return decoded(content, f"{self.tar.name}/{self.name}")


@dataclass(frozen=True)
class RecordedAddress(Recorded):
    """A file of a data set on the hub, at the revision that is being read."""

    address: str

    @property
    def identity(self) -> str:
        """The address, which has the revision in it."""
        return f"address {self.address}"

    def read(self) -> np.ndarray:
        """Implement `Recorded.read`."""
        import fsspec  # only streamed sets need it

        try:
            with fsspec.open(self.address, "rb") as file:
                content: bytes = file.read(_LARGEST)
        except FileNotFoundError:
            raise UnreadableError(f"its file is missing ({self.address})") from None
        except ValueError as error:
            raise UnreadableError(f"its file has an address that is none ({self.address}: {error})") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
            raise UnreadableError(f"its archive is damaged ({self.address}: {error})") from None
        except Exception as error:  # OSError, httpx's, the hub's and the file systems' own are of no common kind
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise CordError(
                f"{self.address}: the hub does not give it ({reason}); what is complete is kept: call again "
                "when the hub is well"
            ) from None
        return decoded(content, self.address)


def decoded(content: bytes, name: str) -> np.ndarray:
    """Decode a recording.

    Raises:
        UnreadableError: it cannot be decoded.
    """
    try:
        return decode_audio(content, name)
    except CordError as error:
        raise UnreadableError(f"its recording is not decodable ({error})") from None
