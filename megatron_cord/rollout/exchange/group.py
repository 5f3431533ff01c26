"""A process group between rank 0 of the trainer and servers, which belong to no common job.

torch.distributed's own init_process_group names one job's ranks; servers and a trainer meet in a group that each side makes apart, under a
store of its own. SGLang makes its side with the same calls (``/init_weights_update_group``).
"""

from __future__ import annotations

import secrets
import socket
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from megatron_cord.errors import CordError
from megatron_cord.parallel import portability
from megatron_cord.rollout.exchange.endpoint import Endpoint, ServerError, ask_each
from megatron_cord.rollout.exchange.way import AttemptFailed

_SETTLE_SECONDS = 5.0  #: how long after one failure others are waited for, to tell who caused it


class ServerGroup:
    """Rank 0 here, the servers' tensor-parallel ranks behind it.

    Args:
        ranks: the servers in their order, with how many ranks each has.
        address: of this machine, as servers reach it; found by asking the system for the route to the first server if None.
        timeout: seconds for joining, and for each broadcast.

    Raises:
        AttemptFailed: not all servers joined.
    """

    def __init__(self, ranks: Mapping[Endpoint, int], address: str | None, timeout: float) -> None:
        self.servers, self._timeout = tuple(ranks), timeout
        self._name = f"cord-{secrets.token_hex(8)}"  # a name of its own: that of a dead trainer's group stays taken
        address = address or _address_towards(self.servers[0])
        world = 1 + sum(ranks.values())
        self._pool = ThreadPoolExecutor(2 * len(ranks) + 2)
        self._group: dist.ProcessGroup | None = None
        try:
            self._store = dist.TCPStore(address, 0, world, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=timeout))
        except (RuntimeError, ValueError) as error:
            raise CordError(
                f"rollout.exchange.address {address} is not an address of this machine ({error}); set the one servers reach"
            ) from None
        joins: dict[Future[object], Endpoint] = {}
        offset = 1
        for server, size in ranks.items():
            body = {"master_address": address, "master_port": self._store.port, "rank_offset": offset, "world_size": world}
            body |= {"group_name": self._name, "backend": portability.backend()}
            joins[self._pool.submit(server.post, "/init_weights_update_group", body, timeout)] = server
            offset += size
        own: Future[object] = self._pool.submit(self._join, world)
        self._settle(joins, own)

    def broadcast(self, flat: Tensor, ready: torch.cuda.Event, path: str, body: dict[str, object]) -> None:
        """Sends uint8 [nbytes] to all servers, which are told by a request what comes. Every reply is read before rank 0 can block for good.

        Raises:
            AttemptFailed: a server refused, died or hung, or the broadcast failed; the group cannot be used again.
        """
        body = body | {"group_name": self._name}
        replies: dict[Future[object], Endpoint] = {
            self._pool.submit(server.post, path, body, self._timeout): server for server in self.servers
        }
        self._settle(replies, self._pool.submit(self._broadcast, flat, ready))

    def close(self, *, broken: bool = False) -> None:
        """Leaves the group; the servers are told to, too, as far as they listen. Safe to call twice."""
        group, self._group = self._group, None
        if group is not None:
            if broken:
                _abort(group)
            else:
                dist.destroy_process_group(group)
            ask_each(self.servers, lambda s: s.post("/destroy_weights_update_group", {"group_name": self._name}, _SETTLE_SECONDS))
        self._pool.shutdown(wait=False)

    def _join(self, world: int) -> None:
        # Private in torch, but the only door to a group across jobs; SGLang's side and its peers' use the same.
        group, _ = distributed_c10d._new_process_group_helper(
            world,
            0,
            [],
            dist.Backend(portability.backend()),
            dist.PrefixStore(self._name, self._store),
            group_name=self._name,  # type: ignore[arg-type]
            timeout=timedelta(seconds=self._timeout),
        )
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
        self._group = group

    def _broadcast(self, flat: Tensor, ready: torch.cuda.Event) -> None:
        if portability.has_cuda():
            torch.cuda.set_device(flat.device)  # a thread starts on device 0
        with torch.cuda.stream(torch.cuda.Stream()):
            ready.wait()
            work = dist.broadcast(flat, 0, group=self._group, async_op=True)
            assert work is not None
            work.wait(timedelta(seconds=self._timeout))
            torch.cuda.current_stream().synchronize()

    def _settle(self, replies: Mapping[Future[object], Endpoint], own: Future[object]) -> None:
        """Waits for rank 0's own part and all replies; at the first failure breaks the group, so that no part waits for the dead."""
        pending = {own, *replies}
        while pending:
            done, pending = wait(pending, self._timeout, FIRST_COMPLETED)
            refused = {replies[f]: e for f in done if f in replies and isinstance(e := f.exception(), ServerError)}
            if refused or own in done and own.exception() is not None or not done:
                self.close(broken=True)
                late, _ = wait(pending, _SETTLE_SECONDS)
                raise AttemptFailed(refused or self._culprits(replies, late, own))
            for future in done:
                future.result()  # anything else than a server's failure is ours

    def _culprits(
        self, replies: Mapping[Future[object], Endpoint], done: set[Future[object]], own: Future[object]
    ) -> dict[Endpoint, ServerError]:
        """Who broke the group when rank 0 noticed first: servers that are gone, or do not answer any more."""
        found: dict[Endpoint, ServerError] = {}
        for future, server in replies.items():
            error = future.exception() if future in done or future.done() else None
            if isinstance(error, ServerError) and error.status is None:
                found[server] = error
            elif not server.is_healthy(_SETTLE_SECONDS):
                found[server] = ServerError(f"{server.url} left the process group and does not answer")
        return found


def _abort(group: dist.ProcessGroup) -> None:
    """Ends a group with operations in flight; a plain destroy would wait for them."""
    try:
        distributed_c10d._abort_process_group(group)
    except RuntimeError:
        pass  # already broken beyond that


def _address_towards(server: Endpoint) -> str:
    """This machine's address on the way to the server; no packet is sent."""
    family, _, _, _, target = socket.getaddrinfo(server.host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])
