"""Weight sync: all that is the same whatever the transport.

One weight sync: read servers' versions; plan what is sent, and check it against their model; open a session on each;
    gather
bucket k+1 from the trainer's ranks while bucket k is sent; close the sessions; name the version, and read it back. A
server that fails anywhere is left out and reported; its weights are of no version. Trained tensors alone are sent,
unless a server does not have the last version: then all. LoRA is sent as it is to servers that can merge it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import broadcast_json
from megatron_cord.rollout.sglang.client.endpoint import Endpoint, ServerError, call_each, without
from megatron_cord.rollout.sglang.weight_sync.bucket import BucketPlan, fill, plan_buckets
from megatron_cord.rollout.sglang.weight_sync.config import WeightSyncConfig
from megatron_cord.rollout.sglang.weight_sync.disk import DiskTransport
from megatron_cord.rollout.sglang.weight_sync.process_group import ProcessGroupTransport
from megatron_cord.rollout.sglang.weight_sync.served import (
    base_of,
    check_fits_server,
    sent_specs,
    served_specs,
    with_lora,
)
from megatron_cord.rollout.sglang.weight_sync.sessions import Sessions, compare_checksums, name_version
from megatron_cord.rollout.sglang.weight_sync.shared_memory import SharedMemoryTransport
from megatron_cord.rollout.sglang.weight_sync.transport import AttemptFailedError, WeightTransport
from megatron_cord.rollout.types import TensorSpec, WeightSource


@dataclass(frozen=True)
class WeightSyncReport:
    """The outcome of a weight sync; the same on all ranks.

    Attributes:
        version: of the weights.
        current: the addresses of servers that have it now.
        failed: of those that do not, with the reason. Their weights may be half of one version and half of another:
            discard or restart them.
        full: whether frozen tensors were sent, too.
        merged: whether all tensors were sent as they are used; else LoRA was, and the servers merged it.
        tensors: how many were sent to each server.
        nbytes: of them.
        buckets: that they were sent in.
        seconds: from the first request to the last answer.
    """

    version: int
    current: tuple[str, ...]
    failed: dict[str, str]
    full: bool
    merged: bool
    tensors: int
    nbytes: int
    buckets: int
    seconds: float


class WeightSync:
    """Brings weights to servers. All ranks of the trainer hold one and call it together; rank 0 sends to the servers.

    Args:
        config: how.
        transport: sends the buckets.
        served: the servers' model, by tensor name.
        base: the identity of its weights, with which servers may merge LoRA; None: they are never sent it.
    """

    def __init__(
        self,
        config: WeightSyncConfig,
        transport: WeightTransport,
        served: Mapping[str, TensorSpec],
        base: str | None = None,
    ) -> None:
        self._config, self._transport, self._served, self._base = config, transport, served, base
        self._version: int | None = None

    def update(
        self,
        source: WeightSource,
        version: int,
        servers: Sequence[Endpoint] = (),
        *,
        full: bool = False,
        flush_cache: bool = True,
    ) -> WeightSyncReport:
        """Give the weights to the servers. Collective over all ranks.

        Servers should be paused: those that generate meanwhile mix versions.

        Args:
            source: the weights.
            version: the name of these weights.
            servers: that get them; only rank 0's argument matters.
            full: send frozen tensors, too, as happens by itself when a server does not have the last version.
            flush_cache: servers drop what they computed for prompts with earlier weights; they must be idle for that,
                so requests that go on after a pause in place need False.

        Raises:
            CordError: the weights do not fit the servers' model, or they cannot be written to disk. No server failure
                is raised.
        """
        start = time.perf_counter()
        main = dist.get_rank() == 0
        failed: dict[str, str] = {}
        alive: list[Endpoint] = []
        if main:
            versions, lost = call_each(servers, lambda server: server.weight_version(self._config.timeout_seconds))
            failed = {server.url: str(error) for server, error in lost.items()}
            alive = without(servers, lost)
            behind = any(found != str(self._version) for found in versions.values())
            if behind and self._version is not None:
                # A server may be a new process at its old address, which is not in our process group.
                self._transport.abandon()
            full = full or behind
        specs: list[TensorSpec] = []
        buckets, merged = 0, True
        while True:
            if main and alive:
                merged = full or source.lora_scale is None or not self.merges(alive)
            order = broadcast_json({"full": full, "merged": merged} if alive else None)
            if order is None:
                break
            full, merged = bool(order["full"]), bool(order["merged"])
            specs = self._plan(source, full, merged)
            lost = {}
            problem = None
            if main:
                try:
                    tensors = source.tensors(full=full, in_pieces=True, merged=merged)
                    scale = None if merged else source.lora_scale
                    lost, buckets, done = self._attempt(tensors, specs, alive, scale)
                except CordError as error:
                    problem, done = str(error), True
                else:
                    if done and without(alive, lost):
                        lost |= self._publish(without(alive, lost), version, flush_cache)
                alive = without(alive, lost)
                failed |= {server.url: str(error) for server, error in lost.items()}
            elif source.in_main_replica:
                deque(source.tensors(full=full, in_pieces=True, merged=merged), maxlen=0)
            outcome = broadcast_json([problem, done] if main else None)
            if outcome[0]:
                raise CordError(outcome[0])
            if outcome[1]:
                break
        self._version = version
        nbytes = sum(spec.nbytes for spec in specs)
        current = tuple(server.url for server in alive)
        report = WeightSyncReport(
            version, current, failed, full, merged, len(specs), nbytes, buckets, time.perf_counter() - start
        )
        plain = broadcast_json(asdict(report))
        return WeightSyncReport(**plain | {"current": tuple(plain["current"])})

    def close(self) -> None:
        """Free buffers and leave groups; safe to call twice."""
        self._transport.close()

    def merges(self, servers: Sequence[Endpoint]) -> bool:
        """Query whether all these servers merge LoRA themselves; on rank 0."""
        return self._base is not None and self._transport.merges(servers, self._base)

    def _plan(self, source: WeightSource, full: bool, merged: bool) -> list[TensorSpec]:
        """Return what is sent, on rank 0; raise on all ranks if it does not fit."""
        problem = None
        specs = source.specs(full=full, merged=merged) if source.in_main_replica else []
        if dist.get_rank() == 0:
            try:
                served = self._served if merged else with_lora(self._served, specs)
                check_fits_server(specs, served, full)
                specs = sent_specs(specs, served)
            except CordError as error:
                problem = str(error)
        problem = broadcast_json(problem)
        if problem:
            raise CordError(problem)
        return specs

    def _plan_buckets(self, specs: list[TensorSpec], bucket_bytes: int) -> list[BucketPlan]:
        """Return what goes in which bucket."""
        return plan_buckets(specs, bucket_bytes)

    def _attempt(
        self,
        tensors: Iterator[tuple[str, Tensor]],
        specs: list[TensorSpec],
        servers: list[Endpoint],
        lora_scale: float | None,
    ) -> tuple[dict[Endpoint, ServerError], int, bool]:
        """Send everything once.

        Returns:
            the servers that failed, the number of buckets, and whether the others have the weights now.
        """
        plans: list[BucketPlan] = []
        sessions = Sessions(self._config.timeout_seconds)
        failures = sessions.begin(servers) if self._transport.in_session else {}
        done = False
        try:
            if remaining := without(servers, failures):
                plans = self._plan_buckets(specs, self._transport.open(remaining, self._config.bucket_bytes))
                self._transport.start(plans, lora_scale)
                failures |= self._send(tensors, plans)
                failures |= self._transport.finish()
                done = True
        except AttemptFailedError as failure:
            failures |= failure.culprits
            if not failure.culprits:  # no server is at fault, so nothing would be better the next time
                unknown = ServerError(
                    f"the process group broke ({failure.why}), and all servers answer; look at their logs"
                )
                failures |= {server: unknown for server in without(servers, failures)}
        finally:
            deque(tensors, maxlen=0)  # the other ranks are gathering
            if not done:
                self._transport.abandon()
        failures |= sessions.end(without(servers, failures))
        return failures, len(plans), done or not without(servers, failures)

    def _publish(self, servers: list[Endpoint], version: int, flush_cache: bool) -> dict[Endpoint, ServerError]:
        """Name the version on servers that have all tensors. Returns the failures."""
        timeout = self._config.timeout_seconds
        failures = call_each(servers, lambda server: server.flush_cache(timeout))[1] if flush_cache else {}
        failures |= name_version(without(servers, failures), str(version), timeout)
        if self._config.compare_checksums:
            failures |= compare_checksums(without(servers, failures), timeout)
        return failures

    def _send(self, tensors: Iterator[tuple[str, Tensor]], plans: list[BucketPlan]) -> dict[Endpoint, ServerError]:
        """Fill one bucket while the one before is in flight."""
        failures: dict[Endpoint, ServerError] = {}
        in_flight: deque[Future[dict[Endpoint, ServerError]]] = deque()
        with ThreadPoolExecutor(1) as sender:
            for index, plan in enumerate(plans):
                while len(in_flight) > int(self._config.overlap):  # bucket index − 2 used this buffer
                    failures |= in_flight.popleft().result()
                buffer = partial(self._transport.buffer, index, plan.nbytes)
                flat = fill(plan, tensors, buffer, borrow=self._transport.borrows)
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
                in_flight.append(sender.submit(self._transport.send, plan, flat, ready))
            for future in in_flight:
                failures |= future.result()
        return failures


def build_weight_sync(
    config: WeightSyncConfig, checkpoint_dir: str | Path, served_dtype: torch.dtype | None = None
) -> WeightSync:
    """Return the weight sync with servers that run this checkpoint.

    Args:
        config: how.
        checkpoint_dir: the one that the servers were started with, by its path on rank 0.
        served_dtype: that they load it in; the checkpoint's own if None.
    """
    transport: WeightTransport
    if config.transport == "process_group":
        transport = ProcessGroupTransport(config.address, config.timeout_seconds, config.stream)
    elif config.transport == "shared_memory":
        transport = SharedMemoryTransport(config.timeout_seconds)
    else:
        transport = DiskTransport(config.directory, config.timeout_seconds)
    return WeightSync(config, transport, served_specs(checkpoint_dir, served_dtype), base_of(checkpoint_dir))
