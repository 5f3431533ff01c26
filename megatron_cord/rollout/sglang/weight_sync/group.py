"""A process group between rank 0 of the trainer and servers, which belong to no common job.

torch.distributed's own init_process_group names one job's ranks; servers and a trainer meet in a group that each side
makes apart, under a store of its own. SGLang makes its side with the same calls (``/init_weights_update_group``).
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from datetime import timedelta
from functools import partial
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import distributed_c10d

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each
from megatron_cord.rollout.sglang.weight_sync.transport import AttemptFailedError

_GRACE_SECONDS = 2.0  #: by which torch's own timeout, which may end the process (NCCL), comes later than ours
_SETTLE_SECONDS = 5.0  #: for which further failures are waited for after the first, to find the server that caused it


class ServerGroup:
    """A group of rank 0 here and the servers' tensor-parallel ranks behind it.

    Args:
        ranks: the servers in their order, with how many ranks each has.
        address: of this machine, as servers reach it; that of the route to the first server if None.
        timeout: seconds for joining, and for each broadcast.

    Raises:
        AttemptFailedError: not all servers joined.
        CordError: this machine has no such address, or cannot make a group at all.
    """

    def __init__(self, ranks: Mapping[Endpoint, int], address: str | None, timeout: float) -> None:
        self.servers, self._timeout = tuple(ranks), timeout
        self._name = f"cord-{secrets.token_hex(8)}"  # a name of its own: that of a dead trainer's group stays taken
        address = address or _address_for(self.servers[0])
        world = 1 + sum(ranks.values())
        self._replies: dict[Future[object], Endpoint] = {}
        self._group: dist.ProcessGroup | None = None
        self._first: dict[Endpoint, ServerError] = {}  # the refusal that broke the group
        self._culprits: dict[Endpoint, ServerError] | None = None
        self._broken = threading.Event()
        self._dying: dist.ProcessGroup | None = None  # broken, but held
        self._work: dist.Work | None = None  # the last broadcast
        self._lock, self._left = threading.Lock(), False
        try:
            store = TCPStore(
                address, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout)
            )
        except (RuntimeError, ValueError) as error:
            raise CordError(
                f"rollout.weight_sync.address {address} is not an address of this machine ({error}); set the one that "
                "servers reach"
            ) from None
        self._store: TCPStore | None = store
        offset = 1
        for server, size in ranks.items():
            body = {"master_address": address, "master_port": store.port, "rank_offset": offset, "world_size": world}
            body |= {"group_name": self._name, "backend": portability.backend()}
            self._replies[_in_thread(partial(server.post, "/init_weights_update_group", body, timeout))] = server
            offset += size
        own = _in_thread(partial(self._join, world, store))
        begun = time.monotonic()
        del store  # `abandon` lets go of it
        done, pending = wait([own, *self._replies], timeout, FIRST_EXCEPTION)
        problem = own.exception() if own in done else None
        if problem is not None and not self._refused() and time.monotonic() - begun < timeout / 2:
            self.abandon()
            raise CordError(f"the trainer cannot make a process group with the servers: {problem}") from None
        if pending or any(part.exception() is not None for part in done):
            raise self._failure("not all joined")

    def announce(self, path: str, body: dict[str, object], timeout: float) -> None:
        """Send all servers a request that names the next broadcasts, answered when they have loaded them all.

        Args:
            path: of the request.
            body: but for the group's name.
            timeout: seconds for the answer.
        """
        body = body | {"group_name": self._name}
        self._replies = {_in_thread(partial(server.post, path, body, timeout)): server for server in self.servers}
        for reply in self._replies:
            reply.add_done_callback(self._on_reply)

    def broadcast(self, flat: Tensor, ready: torch.cuda.Event) -> None:
        """Send uint8 [nbytes] to all servers.

        A refusal ends it at once, so that rank 0 does not wait for those that take no part.

        Raises:
            AttemptFailedError: a server refused, died or hung, or the broadcast failed; the group cannot be used again.
        """
        try:
            self._broadcast(flat, ready)
            return
        except (RuntimeError, ValueError) as error:  # torch's
            # Its text alone: what the exception holds must be gone, or the group's connections stay open.
            why = str(error)
        raise self._failure(why)

    def wait_for_answers(self) -> None:
        """Wait for the answers to what was announced last. Raises as `broadcast`."""
        done, pending = wait(self._replies, self._timeout, FIRST_EXCEPTION)
        if pending or any(reply.exception() is not None for reply in done):
            raise self._failure("no answer")

    def close(self) -> None:
        """Leave the group, and have the servers leave it, as far as they answer. Safe to call twice."""
        with self._lock:
            group, self._group = self._group, None
        if group is not None:
            leaving = self._request_leave()
            self._work = None
            dist.destroy_process_group(group)
            wait(leaving, _SETTLE_SECONDS)

    def abandon(self) -> None:
        """Leave the group with whatever is in flight, and have the servers leave it, as far as they answer.

        Safe to call twice.
        """
        with self._lock:
            left, self._left = self._left, True
        if left:
            return
        self._break()
        self._store = None  # frees servers that wait for others to join
        # gloo cannot end a broadcast that some rank does not join, and others wait for its next one. The rank that
        # refused leaves on request, which ends ours; our connections close when nothing holds the group any more, which
        # frees the others.
        leaving = self._request_leave()
        deadline = time.monotonic() + _SETTLE_SECONDS
        while self._work is not None and not self._work.is_completed() and time.monotonic() < deadline:
            time.sleep(0.01)
        held, self._dying, self._work = [self._dying, self._work], None, None
        _in_thread(held.clear)  # it would wait for a broadcast that is not over
        wait(self._replies, _SETTLE_SECONDS)
        wait(leaving, _SETTLE_SECONDS)

    def _join(self, world: int, store: Store) -> None:
        # Private in torch, but the only way to a group across jobs; SGLang's side uses the same.
        group, _ = distributed_c10d._new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(portability.backend()),
            PrefixStore(self._name, store),
            group_name=self._name,  # type: ignore[arg-type]
            timeout=timedelta(seconds=self._timeout + _GRACE_SECONDS),
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        with self._lock:
            late = self._left
            self._group = None if late else group
        if late:
            dist.destroy_process_group(group)

    def _broadcast(self, flat: Tensor, ready: torch.cuda.Event) -> None:
        group = self._group
        if group is None:
            raise RuntimeError("a server refused")
        begun = time.monotonic()
        start = partial(_start_broadcast, group, flat, ready)
        if self._work is None:  # NCCL makes the group's communicator first, and waits for all ranks without an end
            starting = _in_thread(start)
            self._wait_until(starting.done, begun)
            self._work = cast(dist.Work, starting.result())
        else:
            self._work = start()
        self._wait_until(self._work.is_completed, begun)
        self._work.wait()

    def _wait_until(self, done: Callable[[], bool], begun: float) -> None:
        """Wait, and notice what torch does not: a broken group (gloo), a server that hangs (NCCL)."""
        while not done():
            passed = time.monotonic() - begun
            if self._broken.wait(min(max(passed / 50, 5e-5), 5e-3)) or passed > self._timeout:
                raise RuntimeError("a server refused, or takes too long")

    def _on_reply(self, reply: Future[object]) -> None:
        """Break the group at a refusal, in the reply's thread. Refusals that follow from that do not count."""
        if (error := reply.exception()) is not None:
            with self._lock:
                if self._group is not None and isinstance(error, ServerError) and not self._first:
                    self._first = {self._replies[reply]: error}
            self._break()

    def _break(self) -> None:
        """End what is in flight, as far as NCCL lets it end; once."""
        with self._lock:
            group, self._group = self._group, None
            if group is None:
                return
            self._dying = group
        with contextlib.suppress(RuntimeError):  # broken beyond that
            distributed_c10d._abort_process_group(group)
        self._broken.set()

    def _request_leave(self) -> list[Future[object]]:
        body = {"group_name": self._name}
        return [
            _in_thread(partial(server.post, "/destroy_weights_update_group", body, _SETTLE_SECONDS))
            for server in self.servers
        ]

    def _failure(self, why: str) -> AttemptFailedError:
        """Break the group, so that no part waits for a dead one, and return the servers that caused it."""
        if self._culprits is None:
            first = self._first or self._refused()
            self.abandon()
            gone = {server: error for server, error in self._refused().items() if error.status is None}
            self._culprits = gone or first or self._silent()
        return AttemptFailedError(self._culprits, why)

    def _refused(self) -> dict[Endpoint, ServerError]:
        """Return the servers that have answered with an error by now; raise any other error, which arose here."""
        refused = {}
        for reply, server in self._replies.items():
            error = reply.exception() if reply.done() else None
            if isinstance(error, ServerError):
                refused[server] = error
            elif error is not None:
                raise error
        return refused

    def _silent(self) -> dict[Endpoint, ServerError]:
        """Return the servers that do not answer any more, or whose answer to the last request is missing."""
        waiting = {server for reply, server in self._replies.items() if not reply.done()}
        # Answered by the process that holds the model.
        _, lost = call_each(self.servers, lambda server: server.abilities(_SETTLE_SECONDS))
        return {
            server: ServerError(f"{server.url} left the process group and does not answer")
            for server in waiting | lost.keys()
        }


def _start_broadcast(group: dist.ProcessGroup, flat: Tensor, ready: torch.cuda.Event) -> dist.Work:
    if portability.has_cuda():
        torch.cuda.set_device(flat.device)  # a thread starts on device 0
    with torch.cuda.stream(torch.cuda.Stream()):  # type: ignore[no-untyped-call]
        ready.wait()
        work: dist.Work | None = dist.broadcast(flat, 0, group=group, async_op=True)
        assert work is not None
        return work


def _in_thread(call: Callable[[], object]) -> Future[object]:
    """Return the call's future result, from a daemon thread: a server that hangs may keep it for long."""
    future: Future[object] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future


def _address_for(server: Endpoint) -> str:
    """Return this machine's address on the route to the server; no packet is sent."""
    family, _, _, _, target = socket.getaddrinfo(server.host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
