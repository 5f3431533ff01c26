"""Local copies of remote shards: whole or absent, within a bound, fetched once, with patience."""

from __future__ import annotations

import functools
import http.server
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_cord.data.shards import cache
from megatron_cord.data.shards.cache import FetchError, RemoteFile, ShardCache
from megatron_cord.data.shards.manifest import ShardEntry
from megatron_cord.data.shards.reader import ShardDataset
from megatron_cord.data.shards.streaming import StreamedShards
from megatron_cord.errors import CordError
from megatron_cord.runtime.files import file_digest
from tests.tiny_run import make_samples, write_shards

SIZE = 300_000


class Server:
    """A file server whose connections break as often as it is told to."""

    def __init__(self, directory: Path) -> None:
        self.asked: list[str] = []
        self.breaks = 0  # so many answers more end in their middle
        self.fails = 0  # so many more are refused
        outer = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.asked.append(self.path)
                if outer.fails:
                    outer.fails -= 1
                    self.send_error(503)
                elif outer.breaks and self.path.endswith(".tar"):
                    outer.breaks -= 1
                    content = (directory / self.path.lstrip("/")).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[: len(content) // 2])
                    self.close_connection = True
                else:
                    super().do_GET()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), functools.partial(Handler, directory=str(directory))
        )
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    (tmp_path / "remote").mkdir()
    for number in range(5):
        (tmp_path / "remote" / f"shard-{number:06d}.tar").write_bytes(os.urandom(SIZE))
    return tmp_path / "remote"


@pytest.fixture
def server(remote: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(cache, "_FIRST_PAUSE", 0.01)
    opened = Server(remote)
    yield opened
    opened.close()


def entry(remote: Path, number: int = 0) -> ShardEntry:
    path = remote / f"shard-{number:06d}.tar"
    return ShardEntry(path.name, 1, path.stat().st_size, file_digest(path))


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if not path.name.endswith(".lock"))


def test_a_copy_is_whole_and_made_once(server: Server, remote: Path, tmp_path: Path) -> None:
    """Would catch a copy that differs from its shard, one that is fetched twice, and parts that are left behind."""
    copies = ShardCache(tmp_path / "cache", 10 * SIZE, 5.0)
    wanted = entry(remote)
    threads = [
        threading.Thread(target=copies.fetch, args=(f"{server.address}/{wanted.name}", wanted)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    path = copies.fetch(f"{server.address}/{wanted.name}", wanted)
    assert path.read_bytes() == (remote / wanted.name).read_bytes()
    assert server.asked.count(f"/{wanted.name}") <= 2  # one of them asks for the size alone
    assert names(tmp_path / "cache") == [path.name]


def test_connections_that_fail_are_tried_again(server: Server, remote: Path, tmp_path: Path) -> None:
    """Would catch a run that ends with the first answer of a busy server, and half a shard that counts as whole."""
    copies = ShardCache(tmp_path / "cache", 10 * SIZE, 5.0)
    server.breaks, server.fails = 2, 2
    wanted = entry(remote)
    path = copies.fetch(f"{server.address}/{wanted.name}", wanted)
    assert file_digest(path) == wanted.sha256 and (server.breaks, server.fails) == (0, 0)


def test_patience_ends_where_the_same_bytes_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a source that breaks and cannot seek, of which the same half counts as progress each time."""
    monkeypatch.setattr(cache, "_FIRST_PAUSE", 0.01)
    begun: list[int] = []

    def half(_: RemoteFile, done: int, add: Callable[[bytes], None]) -> Iterator[int]:
        begun.append(done)
        if done:
            raise ValueError("cannot seek")
        for now in range(1, 6):
            add(b"x")
            yield now
        if len(begun) < 100:
            raise ConnectionError("it broke")

    monkeypatch.setattr(RemoteFile, "_copy", half)
    with pytest.raises(FetchError, match=r"http://x: .* attempts in"):
        RemoteFile("http://x", 0.2).read()
    assert begun[:3] == [0, 5, 0]


def test_what_does_not_come_is_said_in_one_line(server: Server, remote: Path, tmp_path: Path) -> None:
    """Would catch patience without end, patience with what is not there, and a shard that was changed."""
    copies = ShardCache(tmp_path / "cache", 10 * SIZE, 0.2)
    wanted = entry(remote)
    server.fails = 10_000
    with pytest.raises(FetchError, match=rf"{server.address}/{wanted.name}: .*503.* attempts in"):
        copies.fetch(f"{server.address}/{wanted.name}", wanted)
    server.fails = 0
    with pytest.raises(FetchError, match=r"none\.tar: it is not there"):
        copies.fetch(f"{server.address}/none.tar", wanted)
    changed = ShardEntry(wanted.name, 1, wanted.bytes, "0" * 64)
    with pytest.raises(FetchError, match=r"does not have the checksum that the manifest lists"):
        copies.fetch(f"{server.address}/{wanted.name}", changed)
    with pytest.raises(FetchError, match=r"nofs://x: ValueError: Protocol not known: nofs"):
        RemoteFile("nofs://x", 0.0).read()
    assert names(tmp_path / "cache") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(CordError, match=r"data\.cache_dir=.*file/cache cannot be written"):
        ShardCache(tmp_path / "file" / "cache", SIZE, 0.0).fetch(f"file://{remote}/{wanted.name}", wanted)


def test_the_bound_holds_and_what_is_used_stays(remote: Path, tmp_path: Path) -> None:
    """Would catch a disk that fills up, and a copy that is removed though others were not used for longer.

    Also a user's own file that is removed because it lies in the same directory, such as $TMPDIR.
    """
    copies = ShardCache(tmp_path / "cache", 3 * SIZE, 0.0)
    entries = [entry(remote, number) for number in range(5)]
    for number, each in enumerate(entries[:3]):
        path = copies.fetch(f"file://{remote}/{each.name}", each)
        os.utime(path, (1000 + number, 1000 + number))
    copies.fetch(f"file://{remote}/{entries[0].name}", entries[0])  # used again: the oldest is number 1 now
    partial = tmp_path / "cache" / f".{'0' * 64}.tar.partial"
    own = [tmp_path / "cache" / name for name in ("results.tar", ".upload.partial", f"{'0' * 64}-old.tar")]
    for file in (partial, *own):
        file.write_bytes(b"of a killed process, or a user's")
        os.utime(file, (1000, 1000))
    copies.fetch(f"file://{remote}/{entries[3].name}", entries[3])
    kept = [f"{entries[number].sha256}.tar" for number in (0, 2, 3)]
    assert names(tmp_path / "cache") == sorted([*kept, *(file.name for file in own)])


def fetch_slowly(directory: Path, address: str, wanted: ShardEntry) -> None:
    cache._CHUNK = 1000
    plain = RemoteFile._copy

    def slow(self: RemoteFile, done: int, add: object) -> Iterator[int]:
        for now in plain(self, done, add):  # type: ignore[arg-type]
            time.sleep(0.01)
            yield now

    RemoteFile._copy = slow  # type: ignore[method-assign]
    ShardCache(directory, 10 * SIZE, 0.0).fetch(address, wanted)


def test_a_process_that_is_killed_leaves_nothing_half(remote: Path, tmp_path: Path) -> None:
    """Would catch half a copy under a shard's name, a lock that stays, and a part that the next one stumbles over."""
    wanted, directory = entry(remote), tmp_path / "cache"
    address = f"file://{remote}/{wanted.name}"
    process = multiprocessing.get_context("forkserver").Process(target=fetch_slowly, args=(directory, address, wanted))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not any(
        path.stat().st_size for path in directory.glob(".*.partial") if directory.is_dir()
    ):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert [name for name in names(directory) if name.endswith(".partial")] and not list(directory.glob("*.tar"))
    path = ShardCache(directory, 10 * SIZE, 0.0).fetch(address, wanted)
    assert file_digest(path) == wanted.sha256 and names(directory) == [path.name]


def test_a_set_behind_an_address(server: Server, remote: Path, tmp_path: Path) -> None:
    """Would catch a manifest or a shard that is asked for at another address, and samples that change on the way."""
    for shard in remote.glob("*.tar"):
        shard.unlink()
    write_shards(remote, make_samples(7, seed=1))
    indexed = ShardDataset(remote)
    server.fails = server.breaks = 1
    stream = StreamedShards(f"{server.address}/", window=1, cache=ShardCache(tmp_path / "cache", 10**9, 5.0))
    stream.expect([0, 1, 2])
    assert [stream[number].id for number in range(7)] == indexed.ids
    assert np.array_equal(stream[6].waveform, indexed[6].waveform)
    stream.close()
