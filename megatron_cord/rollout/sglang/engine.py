"""The engine on SGLang servers: each rank sends its share of the requests, the main rank syncs weights to all servers.

Weights and the list of good servers change only where all ranks are together: at the start, in `update_weights` and in
`recover`. In between each rank notices by itself which servers fail. If all do, `generate` leaves what is not made as
"abort", and `recover`, which `CollectiveEngine` and `Schedule` call, waits for the supervisor to have started some
again, and repeats the weight sync.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from megatron_cord.data.prompts import PromptBuilder
from megatron_cord.errors import CordError
from megatron_cord.parallel.objects import run_on_main
from megatron_cord.rollout.sglang.client.addresses import Addresses
from megatron_cord.rollout.sglang.client.batch import Batch
from megatron_cord.rollout.sglang.client.partial_response import PartialResponse, aborted
from megatron_cord.rollout.sglang.client.pool import Pool
from megatron_cord.rollout.sglang.client.preflight import BASE
from megatron_cord.rollout.sglang.client.protocol import PromptEncoder
from megatron_cord.rollout.sglang.config import SGLangConfig
from megatron_cord.rollout.sglang.control import Control
from megatron_cord.rollout.sglang.models import served_model
from megatron_cord.rollout.sglang.weight_sync import WeightSync, WeightSyncConfig, build_weight_sync
from megatron_cord.rollout.types import GenerationRequest, Rollout, WeightSource

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 1.0  #: between two weight syncs that no server took


class SGLangEngine:
    """A ``RolloutEngine`` that is Pausable, Abortable, Releasable and Recoverable. All ranks make one, together.

    Args:
        checkpoint_dir: that the servers were started with.
        addresses: of the servers.
        config: of requests.
        weight_sync: how weights reach the servers.
        min_servers: how many must answer before it is ready.
        prompts: the checkpoint's prompt builder; None: one is made.

    Attributes:
        weight_version: of the last weight sync; 0 are the checkpoint's.
        prompts: the checkpoint's prompt builder.

    Raises:
        CordError: too few servers answer in time, or one cannot be used for training.
    """

    def __init__(
        self,
        checkpoint_dir: str | Path,
        addresses: Addresses,
        config: SGLangConfig,
        weight_sync: WeightSyncConfig,
        min_servers: int = 1,
        prompts: PromptBuilder | None = None,
    ) -> None:
        self.prompts = prompts or PromptBuilder(checkpoint_dir)
        self.weight_version, self.paused = 0, False
        self._config = config
        self._names = {BASE: 0}
        self._pool = Pool(dist.get_rank())
        self._source: WeightSource | None = None
        self._model = served_model(checkpoint_dir)
        self._control = Control(addresses, self._model.model_type, config.start_seconds)
        self._weight_sync: WeightSync = build_weight_sync(weight_sync, checkpoint_dir)
        self._all_tensors = False  # the next weight sync sends frozen ones, too: servers have lost them
        self._batches: set[Batch] = set()
        self._lock = threading.Lock()
        self._longest = self._connect(min_servers)

    def generate(self, requests: Sequence[GenerationRequest]) -> list[Rollout]:
        """Return one rollout a request, in their order; "abort" where `abort` ended it or no server was left.

        Raises:
            CordError: a request that servers cannot take, refuse, or fail time and again.
        """
        encoder = PromptEncoder(self.prompts, self._longest, self._model)
        for request in requests:
            encoder.check(request)
        max_in_flight = max(1, self._config.max_in_flight // dist.get_world_size())
        responses = [PartialResponse(request, encoder) for request in requests]
        batch = Batch(responses, self._pool, self._config, max_in_flight, self)
        with self._lock:
            self._batches.add(batch)
        try:
            made = batch.run()
        finally:
            with self._lock:
                self._batches.discard(batch)
        return [made[i] if i in made else aborted(request) for i, request in enumerate(requests)]

    def update_weights(self, source: WeightSource, version: int) -> None:
        """Bring the source's trained tensors to all servers that answer; all tensors where a server lacks them.

        All ranks call it together. Servers that fail are left out until the next call. If all do, they are waited for.
        `recover` reads the source again.

        Raises:
            CordError: the tensors do not fit the servers' model, or no server comes back in time.
        """
        self._source = source
        self._send(version)

    def recover(self) -> None:
        """Wait for servers and send them the weights of the last `update_weights`. All ranks together.

        Raises:
            CordError: none comes back in time.
        """
        if self._source is None:
            self._longest = self._connect(1)
        else:
            self._send(self.weight_version)

    def rebases(self) -> bool:
        """Return whether all servers merge LoRA, so that they need but be told to leave it out. All ranks together."""
        return bool(run_on_main(lambda: self._weight_sync.merges(self._control.endpoints(self._pool.servers))))

    @contextmanager
    def base_weights(self) -> Iterator[None]:
        """Let servers have the weights without LoRA within the context, then those of the last update again.

        All ranks together. After an error within the context the engine is not to be used.
        """
        trained = self._source
        if trained is None or trained.lora_scale is None:
            yield
            return
        self._source = trained.without_lora()
        self._send(self.weight_version)
        yield
        self._source = trained
        self._send(self.weight_version)

    def pause(self) -> None:
        """Stop generation; unfinished responses stay with the servers."""
        self.paused = True
        self._control.each("/pause_generation", {"mode": self._config.pause}, self._pool)

    def resume(self) -> None:
        """Go on with unfinished responses."""
        self._control.resume(self._pool)
        self.paused = False

    def abort(self) -> None:
        """End the calls of `generate` in other threads."""
        with self._lock:
            for batch in self._batches:
                batch.abort()

    def release_memory(self) -> None:
        """Let servers that were started with --colocated free their GPU's memory."""
        # Idle first: SGLang ends with an error when memory is released while it generates.
        self._control.each("/pause_generation", {"mode": "abort"}, self._pool)
        self._control.each("/release_memory_occupation", {}, self._pool)

    def restore_memory(self) -> None:
        """Let servers allocate their memory again; the next weight sync sends all tensors."""
        self._control.each("/resume_memory_occupation", {}, self._pool)
        self._control.resume(self._pool)
        self._all_tensors = True

    def close(self) -> None:
        """End what is being generated and leave the servers as they are; safe to call twice."""
        self.abort()
        self._weight_sync.close()

    def version_of(self, name: str) -> int | None:
        """Return what a server's name for its weights means; None for weights of no weight sync of this run."""
        return self._names.get(name)

    def _connect(self, count: int) -> int:
        """Find `count` servers, with the checkpoint's weights; return how many tokens they take, response included."""

        def find() -> tuple[int, list[str]]:
            servers, longest = self._control.connect(count)
            return longest, [server.url for server in servers]

        longest, urls = run_on_main(find)
        self._pool.set(self._control.endpoints(urls))
        return int(longest)

    def _send(self, version: int) -> None:
        """Sync weights, as often as it takes until a server has them."""
        assert self._source is not None
        deadline = time.monotonic() + self._config.start_seconds
        refused = ""

        def find() -> list[str]:
            if refused:
                if time.monotonic() > deadline:
                    raise CordError(
                        f"no rollout server takes the weights of version {version}: {refused}; look at the "
                        "servers' logs"
                    )
                time.sleep(_RETRY_SECONDS)
            return [server.url for server in self._control.answering(deadline)]

        while True:
            urls = run_on_main(find)
            report = self._weight_sync.update(
                self._source,
                version,
                self._control.endpoints(urls),
                full=self._all_tensors,
                flush_cache=not (self.paused and self._config.pause == "in_place"),
            )
            if dist.get_rank() == 0:
                for url, reason in report.failed.items():
                    logger.warning(
                        "rollout: %s did not get the weights of version %d, and is left out until it has: %s",
                        url, version, reason,
                    )  # fmt: skip
            if report.current:
                break
            refused = "; ".join(report.failed.values())
        self._all_tensors = False
        self.weight_version = version
        self._names[str(version)] = version
        self._pool.set(self._control.endpoints(report.current))
