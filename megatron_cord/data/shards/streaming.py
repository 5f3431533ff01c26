"""Reads sets larger than memory and disk: shard by shard, when samples of a shard are first needed.

The manifest tells how many samples each shard has, so that a sample has a number before its shard was seen; only the
indexes of the shards in use are kept. What `ShardDataset` checks when a set is opened is checked here when a shard is:
what cannot be used is found while the run goes on (`DamagedError`). Shards are files of a directory, or behind an
address, from which a `ShardCache` makes local copies.

What it simplifies: ids are compared within a shard alone, and a shard is fetched as a whole.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_cord.data.ordering.damage import DamagedError
from megatron_cord.data.samples import PromptDefaults, PromptLimits, Sample
from megatron_cord.data.shards.cache import FetchError, RemoteFile, ShardCache
from megatron_cord.data.shards.entries import Entry, Skipped, index_shard, read_entry, read_entry_text
from megatron_cord.data.shards.manifest import MANIFEST_NAME, Manifest, is_remote, shard_fault
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import fingerprint

_FETCHERS = 2  # threads that fetch and index the shards that will be needed
_EVICTED = 3  # times that a copy may be removed while it is read


@dataclass(frozen=True)
class StreamLimits:
    """What samples may be like, and what is done with others.

    Attributes:
        prompts: what prompts can be made of; other samples are damaged.
        longest: samples of audio beyond which the run must stop; None has no such length.
        defaults: system prompt and instruction of samples that lack them.
        verify: compare the checksums of shards that are not fetched, too.
        salvage: take from a shard of another size what can be read, instead of nothing.
    """

    prompts: PromptLimits = field(default_factory=PromptLimits)
    longest: int | None = None
    defaults: PromptDefaults = field(default_factory=PromptDefaults)
    verify: bool = False
    salvage: bool = False


class StreamedShards:
    """Samples by number, in the order of the manifest, without an index of all of them.

    Its methods may be called by several threads.

    Args:
        path: a directory with a manifest, or its address.
        window: shards that are read at the same time (`WindowOrder`); twice as many indexes are kept.
        limits: what samples may be like.
        cache: where copies of shards are kept; for an address alone.

    Raises:
        CordError: there is no manifest, or it lists no samples.
    """

    def __init__(
        self,
        path: str,
        *,
        window: int,
        limits: StreamLimits = StreamLimits(),
        cache: ShardCache | None = None,
    ) -> None:
        self.path, self._limits = path.rstrip("/"), limits
        self._cache = cache if is_remote(path) else None
        if is_remote(path) and cache is None:
            raise ValueError(f"{path} is an address, and there is no cache for copies of its shards")
        self.manifest = read_manifest(self.path, 0.0 if cache is None else cache.patience)
        if not self.manifest.samples:
            raise CordError(f"{path} holds no samples: its shards are empty")
        self.counts = [shard.samples for shard in self.manifest.shards]
        self._firsts = np.concatenate([[0], np.cumsum(self.counts)])  # number of each shard's first sample
        self._indexes: OrderedDict[int, Future[list[Entry | Skipped]]] = OrderedDict()
        self._kept = 2 * window + _FETCHERS
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="shards")
        self._expected: dict[int, Future[None]] = {}
        self._failed: set[int] = set()  # in vain fetched ahead

    def __len__(self) -> int:
        return int(self._firsts[-1])

    @property
    def fingerprint(self) -> str:
        """Stands for the samples, their content and their order, by the manifest: 16 hexadecimal digits."""
        given = [] if repr(self._limits.defaults) == repr(PromptDefaults()) else [repr(self._limits.defaults)]
        return fingerprint([*(f"{shard.sha256} {shard.samples}" for shard in self.manifest.shards), *given])

    def __getitem__(self, index: int) -> Sample:
        """Read a sample.

        Raises:
            DamagedError: the sample, or its whole shard, cannot be used.
        """
        return self._read(index, read_entry)

    def without_audio(self, index: int) -> Sample:
        """Read a sample without its audio. Raises as reading it does."""
        return self._read(index, read_entry_text)

    def id_of(self, index: int) -> str:
        """Return a sample's id. Raises as reading it does."""
        shard = self._shard_of(index)
        return self._entry(shard, index).id

    def expect(self, shards: Sequence[int]) -> None:
        """Fetch and index shards in the background, in this order; what fails is tried again when it is needed."""
        with self._lock:
            self._expected = {shard: job for shard, job in self._expected.items() if not job.done()}
            for shard in shards:
                if not (shard in self._indexes or shard in self._expected or shard in self._failed):
                    self._expected[shard] = self._pool.submit(self._prepare, shard)

    def close(self) -> None:
        """Give up what is being fetched."""
        if self._cache is not None:
            self._cache.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, index: int, read: Callable[[Entry, PromptDefaults], Sample]) -> Sample:
        shard = self._shard_of(index)
        for _ in range(_EVICTED):
            entry = self._entry(shard, index)
            if self._cache is not None:
                self._cache.used(entry.shard)
            try:
                return read(entry, self._limits.defaults)
            except FileNotFoundError:  # the copy was removed since it was indexed
                if self._cache is None:
                    raise self._lost(shard, f"{entry.name} is missing since the run began; restore it") from None
                self._file(shard)
            except OSError as error:
                raise DamagedError(f"{entry.where}: cannot be read ({error.strerror})", index, index + 1) from error
            except CordError as error:
                raise DamagedError(str(error), index, index + 1) from error
        message = f"{self._name(shard)}: its copy is removed as soon as it is made; raise data.cache_bytes"
        raise self._lost(shard, message, fatal=True)

    def _shard_of(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def _entry(self, shard: int, index: int) -> Entry:
        """Return where a sample lies."""
        items, place, name = self._index(shard), index - int(self._firsts[shard]), self._name(shard)
        ends_early = bool(items) and isinstance(items[-1], Skipped) and items[-1].place == name
        there = len(items) - ends_early
        if place >= there:
            listed = f"{name} has {there} of the {self.counts[shard]} samples that its manifest lists"
            message = items[-1].message if ends_early and isinstance(items[-1], Skipped) else listed
            raise DamagedError(message, int(self._firsts[shard]) + there, int(self._firsts[shard + 1]))
        item = items[place]
        if isinstance(item, Skipped):
            raise DamagedError(item.message, index, index + 1)
        if self._limits.longest is not None and item.longest > self._limits.longest:
            raise DamagedError(item.too_long(self._limits.longest), index, index + 1, fatal=True)
        return item

    def _index(self, shard: int) -> list[Entry | Skipped]:
        """Return what is in a shard; the threads that need it at the same time wait for one of them to look."""
        with self._lock:
            found = self._indexes.get(shard)
            if found is None:
                mine: Future[list[Entry | Skipped]] = Future()
                self._indexes[shard] = mine
                while len(self._indexes) > self._kept:
                    self._indexes.popitem(last=False)
            self._indexes.move_to_end(shard)
        if found is not None:
            return found.result()
        try:
            mine.set_result(self._look_at(shard))
        except BaseException as error:
            mine.set_exception(error)
        return mine.result()

    def _look_at(self, shard: int) -> list[Entry | Skipped]:
        items: list[Entry | Skipped] = []
        for _ in range(_EVICTED):
            file, limits = self._file(shard), self._limits
            items = list(index_shard(file, limits.prompts, limits.defaults, self._name(shard)))
            if self._cache is None or file.exists():  # else the copy was removed meanwhile
                break
        return items

    def _prepare(self, shard: int) -> None:
        try:
            self._index(shard)
        except (CordError, CancelledError):
            with self._lock:
                self._failed.add(shard)
                self._indexes.pop(shard, None)  # looked at again when it is needed

    def _file(self, shard: int) -> Path:
        """Return a shard's file, or its copy, made first.

        Raises:
            DamagedError: there is none, or another than the manifest lists.
        """
        entry = self.manifest.shards[shard]
        if self._cache is not None:
            try:
                return self._cache.fetch(self._name(shard), entry)
            except FetchError as error:
                raise self._lost(shard, str(error)) from error
            except CordError as error:  # of this node's disk, not of the shard
                raise self._lost(shard, str(error), fatal=True) from error
        path = Path(self.path) / entry.name
        try:
            fault = shard_fault(path, entry, verify=self._limits.verify)
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        if fault is not None and not (self._limits.salvage and path.is_file() and not self._limits.verify):
            raise self._lost(shard, f"{path} {fault}")
        return path

    def _name(self, shard: int) -> str:
        return f"{self.path}/{self.manifest.shards[shard].name}"

    def _lost(self, shard: int, message: str, *, fatal: bool = False) -> DamagedError:
        return DamagedError(message, int(self._firsts[shard]), int(self._firsts[shard + 1]), fatal=fatal)


def read_manifest(path: str, patience: float) -> Manifest:
    """Return the manifest of a directory, or of the directory behind an address.

    Args:
        path: of the directory, or its address.
        patience: seconds for which a connection that fails is tried again.

    Raises:
        CordError: there is none.
    """
    if not is_remote(path):
        if not Path(path).is_dir():
            raise CordError(f"{path} is no directory with a manifest, which data.stream needs; `cord shards` makes one")
        return Manifest.read(Path(path))
    address = f"{path.rstrip('/')}/{MANIFEST_NAME}"
    try:
        content = RemoteFile(address, patience).read()
    except FetchError as error:
        raise CordError(f"{error}; give the address of a directory of shards with a manifest") from error
    return Manifest.parse(content, address)
